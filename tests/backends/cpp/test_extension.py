"""How the compiled library is found, and the reasons given if it cannot be used."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mts_fast
from mts_fast.backends.cpp import extension as module

ROOT = Path(mts_fast.__file__).parents[1]
needs_cpp = pytest.mark.skipif(not module.extension().available, reason=module.extension().reason)


@pytest.fixture
def fresh(monkeypatch):
    """extension() without its cache, as in a new process; a loaded library stays loaded."""
    return module.extension.__wrapped__


def absent(name):
    raise ModuleNotFoundError(name)


@needs_cpp
def test_information():
    info = module.extension().info
    assert info["version"] == mts_fast.__version__
    assert info["torch_target"] == module.OLDEST_TORCH
    assert info["isa"] in ("baseline", "avx2", "avx512")
    assert f'set(TORCH_TARGET "{info["torch_target"]}")' in (ROOT / "CMakeLists.txt").read_text()


WITHOUT_MODULE = """
import sys
sys.modules["mts_fast._C"] = None  # as if the wheel had the module of another Python
import torch
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import label_agreement
from mts_fast import use_backend
print(sorted(extension().info.items()))
with use_backend("cpp"):
    print(label_agreement(torch.ones(2, 1), torch.tensor([[1], [0]]), torch.tensor([4, 4])))
"""


@needs_cpp
def test_another_python_loads_the_library_without_its_module():
    command = [sys.executable, "-c", WITHOUT_MODULE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(sorted(module.extension().info.items())),
        "(tensor([1., 1.]), tensor([1., 1.]))",
    ]


def test_nothing_was_built(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(module.importlib, "import_module", absent)
    monkeypatch.setattr(module, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert "not built: no build was made for this Python; run `make setup`" in fresh().reason
    (tmp_path / "_build.json").write_text(json.dumps({"built": False, "reason": "no cmake"}))
    assert fresh().reason == "the C++ extension is not built: no cmake"


@pytest.mark.parametrize("content", [b"", b"\x7fELF broken"])  # truncated; foreign
def test_a_library_that_does_not_load(content, fresh, monkeypatch, tmp_path):
    library = tmp_path / "libmts_fast_ops.so"
    library.write_bytes(content)
    (tmp_path / "_build.json").write_text(json.dumps({"torch_version": "2.12.0"}))
    monkeypatch.setattr(module.importlib, "import_module", absent)
    monkeypatch.setattr(module, "LIBRARY", library)
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    expected = "built with torch 2.12.0 and runs on torch 2.11 and newer; this is "
    status = fresh()
    assert not status.available
    message = re.escape(expected + torch.__version__) + ".*; run `make setup`"
    assert re.search(message, status.reason)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "[" * 100_000, "{", "\0"])
def test_a_damaged_build_record_is_none(content, fresh, monkeypatch, tmp_path):
    """It breaks neither the import of an op nor the message about a library that does not load."""
    library = tmp_path / "libmts_fast_ops.so"
    library.write_bytes(b"junk")
    (tmp_path / "_build.json").write_text(content)
    monkeypatch.setattr(module.importlib, "import_module", absent)
    monkeypatch.setattr(module, "LIBRARY", library)
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert module.build_record() == {}
    assert "does not load: " in fresh().reason and "it runs on torch 2.11" in fresh().reason


@needs_cpp
@pytest.mark.parametrize("description", ["", "version", "isa=avx2"])
def test_a_library_without_a_description(description, fresh, monkeypatch):
    monkeypatch.setattr(module, "_load", lambda: description)
    assert not fresh().available
    assert "; run `make setup`" in fresh().reason


@needs_cpp
def test_a_library_of_another_version(fresh, monkeypatch):
    record = {"version": "9.9"}
    monkeypatch.setattr(module, "build_record", lambda: record)
    assert f"is of version {mts_fast.__version__}, the package of 9.9; run" in fresh().reason


def build(tmp_path, **environment):
    """Runs setup.py in a copy without csrc and without a PATH; the process and its _build.json."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "mts_fast").mkdir()
    (tmp_path / "mts_fast" / "__init__.py").touch()
    shutil.copy(ROOT / "mts_fast" / "_version.py", tmp_path / "mts_fast")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", "HOME": str(tmp_path), **environment},
    )
    record = tmp_path / "mts_fast" / "_build.json"
    return done, json.loads(record.read_text()) if record.exists() else None


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="installed without its sources")
@pytest.mark.parametrize(
    ("environment", "status", "message"),
    [
        ({"MTS_FAST_CPP": "0"}, 0, "MTS_FAST_CPP=0 was set"),
        ({}, 0, "`cmake"),  # csrc is not there
        ({"MTS_FAST_CPP": "1"}, 1, "mts_fast: MTS_FAST_CPP=1, but `cmake"),
        ({"MTS_FAST_CUDA": "1"}, 1, "mts_fast: MTS_FAST_CUDA=1, but `cmake"),
        ({"MTS_FAST_CUDA": "yes"}, 1, "MTS_FAST_CUDA must be 0, 1 or auto, got 'yes'; set it to"),
        ({"MTS_FAST_CPP": "abc"}, 1, "MTS_FAST_CPP must be 0, 1 or auto, got 'abc'; set it to"),
        ({"MTS_FAST_SANITIZE": "on"}, 1, "MTS_FAST_SANITIZE must be 1 or 0, got 'on'; set it to"),
        ({"MTS_FAST_CPP": "0", "MTS_FAST_CUDA": "x"}, 1, "MTS_FAST_CUDA must be 0, 1 or auto"),
        ({"MTS_FAST_CPP": "", "CXX": "/none/c++"}, 0, "install a C++20 compiler (on Debian `apt"),
    ],
)
def test_build_switches(environment, status, message, tmp_path):
    done, record = build(tmp_path, **environment)
    assert done.returncode == status, done.stderr
    assert message in (done.stderr if status else record["reason"])
