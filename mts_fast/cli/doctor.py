"""`mts-fast doctor`: what runs here, and why what does not run does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

import mts_fast
from mts_fast._extension import extension
from mts_fast.hypergradient import ENGINES
from mts_fast.ops import registry

# optional packages and what they are for
OPTIONAL = {
    "triton": "Triton kernels",
    "safetensors": "FeatureTable on disk",
    "sklearn": "the demo's digits",
    "matplotlib": "the demo's pictures",
    "rich": "the demo's tables and progress bars",
}


def report() -> str:
    """The whole report as text."""
    return "\n".join([*_versions(), "", *_backends(), "", *_ops(), "", *_packages()])


def _versions() -> list[str]:
    gpu = "none"
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpu = ", ".join(f"{g.name} (sm_{g.major}{g.minor})" for g in found)
    built = torch.version.cuda or "CPU only"
    return [
        f"mts_fast {mts_fast.__version__}   Python {platform.python_version()}   "
        f"torch {torch.__version__} (built for CUDA: {built})",
        f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads   "
        f"GPU: {gpu}",
    ]


def _backends() -> list[str]:
    lines = [f"backend in force: {registry.current_backend()}"]
    for name in registry.PREFERENCE:
        why = registry.backend_reasons(name)
        state = "ok" if not why else "not available: " + "; ".join(why)
        lines.append(f"  {name:<10} {state}")
    for key, value in extension().info.items():
        lines.append(f"  {'':<10} {key}: {value or 'none'}")
    return lines


def _ops() -> list[str]:
    ops = [f"  {op:<24} {', '.join(found)}" for op, found in registry.registered().items()]
    return ["ops and their implementations", *ops, f"engines: {', '.join(ENGINES)}"]


def _packages() -> list[str]:
    lines = ["optional packages"]
    for name, purpose in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            state = "missing: pip install 'mts_fast[demo]'"
        else:
            state = importlib.metadata.version({"sklearn": "scikit-learn"}.get(name, name))
        lines.append(f"  {name:<12} {state:<10} {purpose}")
    return lines
