"""House rules that a machine can check: directions of imports, file lengths, variable names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mts_fast

PACKAGE = Path(mts_fast.__file__).parent
LONGEST = 400
# a module may import from its own row and from those below it.
ROWS = (
    ("cli",),
    ("demo", "pipeline"),
    ("training",),
    ("distributed",),
    ("selection",),
    ("features",),
    ("hypergradient", "diagnostics", "sampling", "tuning"),
    ("ops",),
    ("backends",),
    ("reference",),
    (
        *("_ambient", "_check", "_columns", "_files", "_hosts", "_interrupts", "_isolation"),
        *("_launcher", "_multi_tensor", "_outputs", "_process", "_sharding", "_version"),
    ),
)
HEIGHT = {name: -i for i, row in enumerate(ROWS) for name in row}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("mts_fast", "tests", "benchmarks", "scripts", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
# names that do not say what a variable holds
VAGUE = {"found", "own", "given", "taken", "wide", "kept"}
EXTRAS = (
    "captum",
    "faiss",
    "jinja2",
    "matplotlib",
    "pydantic",
    "sklearn",
    "safetensors",
    "rich",
    "triton",
    "pybind11",
)


def part_of(path):
    """The package or module directly under mts_fast that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source):
    """Parts of mts_fast that some source imports, also inside functions; "" is mts_fast itself."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from mts_fast import ops` names a part, `from mts_fast import MTSStep` the whole
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *rest = name.split(".")
            if root == "mts_fast":
                known = rest and (
                    (PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").exists()
                )
                # the compiled module belongs to the one that loads it
                yield "backends" if rest == ["_C"] else rest[0] if known else ""


def wrong_imports(part, source):
    """Imports that point upwards; the whole of mts_fast is for the command line alone."""
    return [
        imported or "mts_fast"
        for imported in imported_parts(source)
        if (part not in ("cli", "demo") if not imported else HEIGHT[imported] > HEIGHT[part])
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    assert part_of(path) in HEIGHT, "a new part of mts_fast needs its place in ROWS"
    assert wrong_imports(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("ops", "from mts_fast import training", ["training"]),
        ("ops", "def f():\n    from mts_fast.features.table import FeatureTable", ["features"]),
        ("reference", "import mts_fast.backends.registry as r", ["backends"]),
        ("training", "from mts_fast import MTSStep", ["mts_fast"]),
        ("training", "import mts_fast", ["mts_fast"]),
        ("_check", "from mts_fast.reference import kappa", ["reference"]),
        ("training", "from mts_fast import ops, reference\nimport torch", []),
        ("cli", "import mts_fast\nfrom mts_fast.training import MTSStep", []),
        ("ops", "from mts_fast.backends.registry import resolve", []),
    ],
)
def test_the_walk_sees_every_form_of_import(part, source, wrong):
    assert wrong_imports(part, source) == wrong


@pytest.mark.parametrize("words", ["--help", "--version", "features --help"])
def test_help_leaves_torch_alone(words):
    script = (
        "import sys; from mts_fast.cli.main import main\n"
        f"assert main({words.split()!r}) == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mts-fast" in done.stdout


def test_import_brings_torch_and_nothing_else():
    """In a fresh process, without the modules that torch imports itself."""
    script = (
        "import sys, torch; before = set(sys.modules); import mts_fast; mts_fast.MTSStep; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mts_fast", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    brought = done.stdout.split()
    assert "mts_fast" in brought
    assert set(brought).isdisjoint(EXTRAS)
    third_party = set(brought) - set(sys.stdlib_module_names) - {"mts_fast", "torch"}
    assert third_party == set()
    assert done.stderr == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def vague_names(source):
    """Line and name, wherever some source binds a variable or an argument to a vague name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in VAGUE:
            yield node.lineno, node.arg


def test_variables_are_named_by_what_they_hold():
    bound = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        for line, name in sorted(vague_names(path.read_text()))
    ]
    assert not bound, "\n".join(bound)


@pytest.mark.parametrize(
    "source",
    [
        "own = 1",
        "own: int = 1",
        "a, (own, *b) = c",
        "for own in a: pass",
        "[own for own in a]",
        "(own := 1)",
        "with a as own: pass",
        "def f(own): pass",
        "def f(*own): pass",
        "def f(a, *, own=1): pass",
        "lambda own: 1",
    ],
)
def test_the_walk_sees_every_form_of_binding(source):
    assert list(vague_names(source)) == [(1, "own")]


def test_reading_a_vague_name_is_not_binding_it():
    assert list(vague_names("f(own=a.own, b=kept)\na.own = 1\na['own'] = 1")) == []
