"""Sources and wheels: what they hold, with a compiler and without."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from script_modules import script

from mts_fast._version import __version__ as VERSION

ROOT = Path(__file__).resolve().parents[2]
# compiling takes minutes, so the whole suite alone does it
ALL = os.environ.get("MTS_FAST_TEST_ALL") == "1"
compiles = pytest.mark.skipif(not ALL, reason="compiles the kernels; make test-all runs it")
FILES = (
    *("CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"),
    *("constraints.txt", "mts_fast_command.py", "pyproject.toml", "setup.py"),
)
# several times the present size, a fraction of benchmarks/ or a compiled library
MOST_BYTES = 1_000_000
# an editable installation of the checkout would lend its _C to a package that has none
RUNS = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
import mts_fast, torch
from mts_fast.cli.main import main
from mts_fast.ops import label_agreement
print(mts_fast.__file__)
print(label_agreement(torch.ones(2, 1), torch.tensor([[1], [0]]), torch.tensor([4, 4])))
raise SystemExit(main(["doctor"]))
"""


def build(hook, source, target, **environment):
    """Runs a hook of the build backend as pip does; the file that it made."""
    target.mkdir(exist_ok=True)
    code = f"from setuptools.build_meta import {hook} as hook; print('made', hook({str(target)!r}))"
    command = [sys.executable, "-c", code]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, cwd=source, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.splitlines()[-1].removeprefix("made ")


def unpacked(archive, folder):
    """The folder of the sources in an archive."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / f"mts_fast-{VERSION}"


def names(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return sorted(opened.namelist())


def installed(wheel, folder):
    """What a small program and the doctor print where the wheel is unpacked, outside of the
    checkout."""
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder)
    settings = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", RUNS]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{folder}/mts_fast/__init__.py\n(tensor([1., 1.]), ")
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The archive of sources from a checkout in which an earlier build left its files."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("csrc", "mts_fast"):
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_one.py").touch()
    for name in ("_C.cpython-311-x86_64-linux-gnu.so", "libmts_fast_ops.so", "_build.json"):
        (checkout / "mts_fast" / name).write_text("stale")
    return build("build_sdist", checkout, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def pure_wheel(sources, tmp_path_factory):
    folder = unpacked(sources, tmp_path_factory.mktemp("unpacked"))
    (folder / "mts_fast" / "libmts_fast_ops.so").write_text("stale")
    return build("build_wheel", folder, tmp_path_factory.mktemp("wheel"), MTS_FAST_CPP="0")


def test_sources_have_what_a_build_needs_and_no_more(sources, tmp_path):
    assert sources.name == f"mts_fast-{VERSION}.tar.gz"
    assert sources.stat().st_size < MOST_BYTES
    folder = unpacked(sources, tmp_path)
    listed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    needed = [
        path.relative_to(ROOT).as_posix()
        for part in ("csrc", "mts_fast")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".cpp", ".cu", ".h", ".py", ".json", ".j2", ".toml", ".typed")
    ]
    expected = {*needed, *FILES, "PKG-INFO", "setup.cfg"} - {"mts_fast/_build.json"}
    assert {name for name in listed if not name.startswith("mts_fast.egg-info/")} == expected


def test_a_wheel_without_kernels_is_pure(pure_wheel):
    assert pure_wheel.name == f"mts_fast-{VERSION}-py3-none-any.whl"
    assert script("check_wheel").faults(pure_wheel) == []
    with zipfile.ZipFile(pure_wheel) as opened:
        record = json.loads(opened.read("mts_fast/_build.json"))
    assert not record["built"] and "MTS_FAST_CPP=0 was set" in record["reason"]


def test_a_wheel_without_kernels_works_and_says_why(pure_wheel, tmp_path):
    printed = installed(pure_wheel, tmp_path)
    assert "cpp        not available: the C++ extension is not built: MTS_FAST_CPP=0" in printed


def changed(wheel, folder, changes, name=None):
    """A copy of a wheel with other files; None leaves one out."""
    copy = folder / (name or wheel.name)
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(copy, "w") as new:
        contents = {each: old.read(each) for each in old.namelist()} | changes
        for each, content in contents.items():
            if content is not None:
                new.writestr(each, content)
    return copy


INFO = f"mts_fast-{VERSION}.dist-info"


@pytest.mark.parametrize(
    ("changes", "name", "fault"),
    [
        ({"mts_fast/py.typed": None}, None, "lacks mts_fast/py.typed"),
        ({"mts_fast/demo/options.json": None}, None, "lacks mts_fast/demo/options.json"),
        ({"mts_fast_command.py": None}, None, "lacks mts_fast_command.py"),
        ({"mts_fast/training/step.py": None}, None, "lacks mts_fast/training/step.py"),
        ({"tests/test_one.py": b""}, None, "should not have tests/test_one.py"),
        ({"mts_fast/big": bytes(30_000_000)}, None, "bytes"),
        ({"mts_fast/_build.json": b'{"built": true}'}, None, "_build.json says {'built': True}"),
        ({"mts_fast/_build.json": b'{"built": false}'}, None, "does not say why"),
        ({f"{INFO}/entry_points.txt": b""}, None, "no entry point mts-fast"),
        ({f"{INFO}/licenses/LICENSE": None}, None, "no LICENSE"),
        ({f"{INFO}/METADATA": None}, None, "another package or version"),
        ({f"{INFO}/METADATA": b"Version: 9\nRequires-Dist: numpy\n"}, None, "has version 9"),
        ({f"{INFO}/METADATA": b"Version: 9\nRequires-Dist: numpy\n"}, None, "torch is not"),
        ({f"{INFO}/WHEEL": b"Root-Is-Purelib: false\nTag: py3-none-any\n"}, None, "Purelib is f"),
        (
            {f"{INFO}/WHEEL": b"Root-Is-Purelib: true\nTag: py3-none-win32\n"},
            None,
            "tag py3-none-w",
        ),
        ({}, f"mts_fast-{VERSION}-cp311-none-any.whl", "name says cp311-none-any"),
    ],
)
def test_the_check_of_a_wheel_sees_what_is_wrong(changes, name, fault, pure_wheel, tmp_path):
    wrong = script("check_wheel").faults(changed(pure_wheel, tmp_path, changes, name))
    assert any(fault in each for each in wrong), wrong


def test_the_check_of_a_wheel_sees_libraries_that_are_bundled_or_link_others(pure_wheel, tmp_path):
    """The module of torch stands for a copy of torch."""
    pytest.importorskip("elftools")  # a machine without network may lack it
    compiled = pytest.importorskip("torch._C").__file__
    content = Path(compiled).read_bytes()
    wheel = changed(pure_wheel, tmp_path, {"mts_fast.libs/libtorch.so": content})
    wrong = script("check_wheel").faults(wheel)
    assert "should not have mts_fast.libs/libtorch.so" in wrong
    assert any("links libtorch_python.so" in fault for fault in wrong), wrong
    assert any("not its own folder alone" in fault for fault in wrong), wrong


def test_the_command_of_the_check(pure_wheel, tmp_path, capsys):
    main = script("check_wheel").main
    assert main([]) == 2 and "run make dist" in capsys.readouterr().out
    assert main([str(pure_wheel)]) == 0 and capsys.readouterr().out.endswith(": ok\n")
    broken = changed(pure_wheel, tmp_path, {"mts_fast/py.typed": None})
    assert main([str(pure_wheel), str(broken)]) == 1
    assert f"{broken}: \n  lacks mts_fast/py.typed\n" in capsys.readouterr().out


@compiles
def test_a_clone_and_its_sources_make_the_same_wheel(tmp_path):
    pytest.importorskip("elftools")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    clone = build("build_wheel", tmp_path / "clone", tmp_path / "a", MTS_FAST_CPP="1")
    archive = build("build_sdist", tmp_path / "clone", tmp_path / "sources")
    folder = unpacked(archive, tmp_path / "unpacked")
    from_sources = build("build_wheel", folder, tmp_path / "b", MTS_FAST_CPP="1")
    assert clone.name == from_sources.name and "-py3-none-linux_" in clone.name
    assert names(clone) == names(from_sources)
    assert script("check_wheel").faults(from_sources) == []
    assert "cpp        ok\n" in installed(from_sources, tmp_path / "installed")


@compiles
def test_without_a_compiler_the_wheel_is_pure_and_says_why(sources, tmp_path):
    folder = unpacked(sources, tmp_path)
    wheel = build("build_wheel", folder, tmp_path / "wheel", CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    printed = installed(wheel, tmp_path / "installed")
    assert 'The C++ compiler "/bin/false" is not able to compile a simple test program' in printed
    assert "install a C++20 compiler" in printed
