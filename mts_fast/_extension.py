"""Loads the optional C++ ops library once, on first use, and remembers why it could not."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent
REBUILD = "run `make setup` or `pip install --no-build-isolation .` again"


@dataclass(frozen=True)
class ExtensionStatus:
    """Whether the C++ kernels run here: `info` is the build record, `reason` why they do not."""

    available: bool
    reason: str = ""
    info: dict[str, str] = field(default_factory=dict)


@functools.cache
def extension() -> ExtensionStatus:
    """Import `mts_fast._C`, which loads the ops library, and report the outcome."""
    try:
        module = importlib.import_module("mts_fast._C")
    except ModuleNotFoundError:
        return ExtensionStatus(False, f"the C++ extension is not built: {_build_reason()}")
    except ImportError as error:
        return ExtensionStatus(False, f"the C++ extension does not load: {error}; {REBUILD}")
    return ExtensionStatus(True, info=dict(module.build_info()))


def _build_reason() -> str:
    record = PACKAGE / "_build.json"
    try:
        reason = json.loads(record.read_text())["reason"]
    except (OSError, ValueError, KeyError):
        reason = ""
    return reason or f"no build was made for this Python; {REBUILD}"
