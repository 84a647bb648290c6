"""`mts-fast doctor`: what runs here, and reasons for what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform

import torch

import mts_fast
from mts_fast._launcher import place
from mts_fast.backends import registry
from mts_fast.backends.cpp.extension import build_record, extension
from mts_fast.backends.triton.eligibility import interpreted
from mts_fast.backends.verdicts import table as verdicts
from mts_fast.backends.verdicts.environment import environment
from mts_fast.cli.packages import OPTIONAL, hint_for
from mts_fast.cli.users_model import users_model
from mts_fast.hypergradient import ENGINES


def report() -> str:
    """The whole report as text."""
    return "\n".join(
        [*_versions(), "", *_backends(), "", *_ops(), "", *_verdicts(), "", *_packages()]
    )


def model_report(spec: str) -> str:
    """Which engine serves the model of PACKAGE.MODULE:FACTORY; with a batch, how exactly."""
    with users_model("doctor", spec) as (model, batch):
        parts = [str(mts_fast.explain_engine(model, *batch))]
        if batch:
            parts.append(str(mts_fast.check_engine(model, *batch)))
    return "\n\n".join(parts)


def _versions() -> list[str]:
    gpu = "none"
    if torch.cuda.is_available():
        try:
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            gpu = ", ".join(f"{card.name} (sm_{card.major}{card.minor})" for card in cards)
        except RuntimeError as error:  # the driver is in a bad state: part of the report
            gpu = str(error).partition("\n")[0]
    built = torch.version.cuda or "CPU only"
    here = place(shared=False)
    ranks = f"{here.ranks}, {here.local_ranks} of them on this host" if here.ranks > 1 else "1"
    return [
        f"mts_fast {mts_fast.__version__}   Python {platform.python_version()}   "
        f"torch {torch.__version__} (built for CUDA: {built})",
        f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads   "
        f"GPU: {gpu}",
        f"ranks: {ranks}",
    ]


def _backends() -> list[str]:
    try:
        backend = registry.current_backend()
    except ValueError as error:  # the environment variable names no backend, which stops every op
        backend = f"none: {error}"
    lines = [f"backend in force: {backend}"]
    for name in registry.PREFERENCE:
        why = registry.backend_reasons(name)
        state = "not available: " + "; ".join(why) if why else "ok" + _note(name)
        lines.append(f"  {name:<10} {state}")
        lines += _build() if name == "cpp" else []
    return lines


def _build() -> list[str]:
    """How the C++ kernels were built."""
    lines = [f"  {'':<10} {key}: {value or 'none'}" for key, value in extension().info.items()]
    if build_record().get("cuda_reason"):
        lines.append(f"  {'':<10} without CUDA kernels: {build_record()['cuda_reason']}")
    return lines


def _note(backend: str) -> str:
    """A remark on a backend that can run."""
    if backend != "triton":
        return ""
    how = "in triton's interpreter, for tests" if interpreted() else "where it is named"
    return f", {how}: 'auto' takes its kernels only where `mts-fast tune` has timed them"


def _ops() -> list[str]:
    ops = [f"  {op:<28} {', '.join(backends)}" for op, backends in registry.registered().items()]
    return ["ops and their implementations", *ops, f"engines: {', '.join(ENGINES)}"]


def _verdicts() -> list[str]:
    """What `mts-fast tune` has measured on this machine, and results that were wrong."""
    lines = ["what was timed here (mts-fast tune)"]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in [torch.device("cpu"), *devices]:
        here = environment(device)
        path = verdicts.path_of(here)
        known = {} if path is None else verdicts.read(path, here)
        wins = sum(verdict["wins"] for verdict in known.values())
        lines.append(
            f"  {device!s:<12} {len(known)} verdicts, {wins} for a kernel   {path or 'off'}"
        )
        lines += [
            f"  {'':<12} not used: {name}: {verdict['why']}"
            for name, verdict in known.items()
            if not verdict["wins"] and "us" not in verdict
        ]
    return lines


def _packages() -> list[str]:
    lines = ["optional packages"]
    for name, package in OPTIONAL.items():
        state = _installed(name, package.distribution) or f"missing: {hint_for(name)}"
        lines.append(f"  {name:<12} {state:<10} ({package.purpose})")
    return lines


def _installed(name: str, distribution: str) -> str:
    """Version of a package, "" where there is none."""
    try:
        if importlib.util.find_spec(name) is None:
            return ""
    except (ImportError, ValueError):  # something without a spec took its place in sys.modules
        return ""
    try:
        return importlib.metadata.version(distribution or name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
