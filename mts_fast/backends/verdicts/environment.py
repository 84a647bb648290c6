"""What a verdict holds for: the device, the driver, the versions, and the code of the kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

import mts_fast.backends as backends
from mts_fast._version import __version__
from mts_fast.backends.cpp.extension import build_record, extension

Environment = dict[str, str | int]
# characters of the hash that names a file
DIGITS = 16


def environment(device: torch.device) -> Environment:
    """Names and versions that decide how fast a kernel is. Another environment has other verdicts.

    An editable install keeps its version while its kernels change, so their sources count, too.
    """
    shared: Environment = {
        "type": device.type,
        "torch": torch.__version__,
        "mts_fast": __version__,
        "kernels": _sources(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return shared | {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
        }
    return shared | {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "build": json.dumps(
            {**extension().info, **{k: str(v) for k, v in build_record().items()}}, sort_keys=True
        ),
    }


def digest(content: Mapping[str, object]) -> str:
    """A short name for some content; of an environment, that of its file."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@functools.cache
def _sources() -> str:
    """Hash of the sources of all backends."""
    folder = Path(backends.__file__).parent
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content.update(f"{path.relative_to(folder)}\n".encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:DIGITS]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    """The driver's version where the system shows it, else the CUDA version that it supports."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return str(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
