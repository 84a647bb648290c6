"""Extras: every optional package that is imported has one, and the hints name it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from script_modules import script

import mts_fast
from mts_fast.cli.packages import OPTIONAL, hint_for

PACKAGE = Path(mts_fast.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
missing = script("missing")
CORE = {missing.name_of(requirement) for requirement in PROJECT["dependencies"]}
PIP = re.compile(r"pip install ((?:[^\s`;,)]|\s(?=-|'))+)")
# what error texts name besides extras: the package's own build, and torchvision for its download
OTHER_INSTALLS = {"--no-build-isolation", "torchvision"}


def constants(node):
    """Every text in an expression."""
    return [
        child.value
        for child in ast.walk(node)
        if isinstance(child, ast.Constant) and isinstance(child.value, str)
    ]


def imported(source):
    """Packages that some source imports: by statement, or by name with import_module or
    find_spec, or in a list of what a verb needs."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("import_module", "find_spec"):
                names = [text for argument in node.args for text in constants(argument)]
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("_NEEDS"):
            names = constants(node.value)
        yield from (name.partition(".")[0] for name in names)


VERBS = ("verbs.py", "data_verbs.py")


def test_the_walk_sees_every_form_of_import():
    source = (
        "import a.b\nfrom c.d import e\ndef f():\n    importlib.import_module('g')\n"
        "importlib.import_module(x if x == 'h' else 'i.j')\nimportlib.util.find_spec('k')\n"
        "VERB_NEEDS = ('l.m', 'n')\nOTHER = ('o',)"
    )
    assert set(imported(source)) == set("acghikln")


def test_every_imported_package_is_required_or_optional():
    names = {name for path in PACKAGE.rglob("*.py") for name in imported(path.read_text())}
    third_party = {name for name in names if name} - set(sys.stdlib_module_names) - {"mts_fast"}
    assert third_party - CORE == set(OPTIONAL)


@pytest.mark.parametrize("module", OPTIONAL)
def test_the_hint_names_an_extra_that_has_the_package(module):
    package = OPTIONAL[module]
    requirements = missing.of_extra(PROJECT, package.extra)
    assert (package.distribution or module) in map(missing.name_of, requirements)
    assert hint_for(module) == f"pip install 'mts_fast[{package.extra}]'"


def test_other_modules_have_no_hint():
    assert hint_for("no_such_module") == ""


@pytest.mark.parametrize("verb", ["demo", "train"])
def test_an_extra_installs_what_its_verb_needs(verb):
    """mts-fast demo and train import these before their work."""
    sources = [ast.parse((PACKAGE / "cli" / name).read_text()) for name in VERBS]
    needs = next(
        constants(node.value)
        for node in (node for source in sources for node in source.body)
        if isinstance(node, ast.Assign) and node.targets[0].id == f"{verb.upper()}_NEEDS"
    )
    distributions = set(map(missing.name_of, missing.of_extra(PROJECT, verb)))
    for name in needs:
        module = name.partition(".")[0]
        assert (OPTIONAL[module].distribution or module) in distributions


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_name_extras_that_exist(extra):
    assert all(not r.startswith("mts_fast") for r in missing.of_extra(PROJECT, extra))


def test_texts_name_extras_that_exist():
    """Every `pip install` in the package's texts and in the documents."""
    texts = [
        text for path in PACKAGE.rglob("*.py") for text in constants(ast.parse(path.read_text()))
    ]
    installs = [install for text in texts for install in PIP.findall(text)]
    assert installs
    for install in installs:
        extra = re.fullmatch(r"'mts_fast\[(\w+)\]'", install)
        # a part of a format string ends before its extra, which hint_for's test checks
        known = extra[1] in EXTRAS if extra else install.split()[0] in OTHER_INSTALLS
        assert known or install == "'mts_fast[", install
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for names in re.findall(r"mts_fast\S*\[([a-z,]+)\]'", document.read_text()):
            assert set(names.split(",")) <= set(EXTRAS), document


def test_the_table_of_extras_is_complete():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert table == list(EXTRAS)


def test_documents_name_the_pinned_torch():
    pins = (ROOT / "constraints.txt").read_text()
    for document in ("README.md", "docs/install.md"):
        for version in re.findall(r"torch==[\d.]+", (ROOT / document).read_text()):
            assert version in pins.splitlines(), document
