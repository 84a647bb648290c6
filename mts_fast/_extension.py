"""Loads the optional C++ ops library once, on first use, and remembers why it could not."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARY = PACKAGE / "libmts_fast_ops.so"
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
        lines = importlib.import_module("mts_fast._C").build_info()
    except ModuleNotFoundError:
        if not LIBRARY.exists():
            return ExtensionStatus(False, f"the C++ extension is not built: {_build_reason()}")
        return _without_module()
    except ImportError as error:
        return ExtensionStatus(False, f"the C++ extension does not load: {error}; {REBUILD}")
    return ExtensionStatus(True, info=_parse(lines))


def _without_module() -> ExtensionStatus:
    """The library depends on no Python, `_C` on one: a wheel serves every Python through ctypes."""
    import torch

    try:
        torch.ops.load_library(str(LIBRARY))
        ask = ctypes.CDLL(str(LIBRARY)).mts_fast_build_info
    except (OSError, AttributeError) as error:
        return ExtensionStatus(False, f"the C++ extension does not load: {error}; {REBUILD}")
    ask.restype = ctypes.c_char_p
    return ExtensionStatus(True, info=_parse(ask().decode()))


def _parse(lines: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in lines.splitlines())


def _build_reason() -> str:
    record = PACKAGE / "_build.json"
    try:
        reason = json.loads(record.read_text())["reason"]
    except (OSError, ValueError, KeyError):
        reason = ""
    return reason or f"no build was made for this Python; {REBUILD}"
