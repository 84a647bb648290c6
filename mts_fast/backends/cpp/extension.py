"""Loads the optional C++ ops library once, on first use, and remembers why it could not."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
LIBRARY = PACKAGE / "libmts_fast_ops.so"
# the version of the stable ABI that CMakeLists.txt asks for
OLDEST_TORCH = "2.11"
REBUILD = "run `make setup` or `pip install --no-build-isolation .` again"


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the C++ kernels run here: `info` is the build record, `reason` why they do not."""

    available: bool
    reason: str = ""
    info: dict[str, str] = field(default_factory=dict)


@functools.cache
def extension() -> ExtensionStatus:
    """Load the ops library, through `mts_fast._C` or without it, and report the outcome."""
    try:
        info = _parse(_load())
    except (ImportError, OSError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not LIBRARY.exists():
            return ExtensionStatus(False, f"the C++ extension is not built: {_build_reason()}")
        return ExtensionStatus(False, f"the C++ extension does not load: {_mismatch(error)}")
    version = info.get("version", "unknown")
    wanted = build_record().get("version", version)
    if version != wanted:
        reason = f"the C++ extension is of version {version}, the package of {wanted}"
        return ExtensionStatus(False, f"{reason}; {REBUILD}")
    return ExtensionStatus(True, info=info)


def _load() -> str:
    """Load the library and return its build info, through `_C` or, where this Python has none,
    through ctypes: `_C` is built for one Python version, the library for all."""
    try:
        return importlib.import_module("mts_fast._C").build_info()
    except ModuleNotFoundError:
        if not LIBRARY.exists():
            raise
    import torch

    torch.ops.load_library(str(LIBRARY))
    build_info = ctypes.CDLL(str(LIBRARY)).mts_fast_build_info
    build_info.restype = ctypes.c_char_p
    return build_info().decode()


def _mismatch(error: Exception) -> str:
    """Why an existing library does not load: mostly another torch than it was built for."""
    import torch

    built = build_record().get("torch_version")
    made = f"it was built with torch {built} and " if built else "it "
    serves = f"{made}runs on torch {OLDEST_TORCH} and newer; this is {torch.__version__}"
    return f"{error}; {serves}; {REBUILD}"


def _parse(lines: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines.splitlines())


def build_record() -> dict[str, Any]:
    """The record that the build wrote (setup.py); empty where it is missing or damaged."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _build_reason() -> str:
    return build_record().get("reason") or f"no build was made for this Python; {REBUILD}"
