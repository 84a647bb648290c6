"""`mts-fast doctor`: what runs here, and reasons for what does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import mts_fast
from mts_fast._check import describe, fail
from mts_fast.backends import registry
from mts_fast.backends.cpp.extension import build_record, extension
from mts_fast.backends.triton.eligibility import interpreted
from mts_fast.cli.packages import OPTIONAL, hint_for
from mts_fast.hypergradient import ENGINES


def report() -> str:
    """The whole report as text."""
    return "\n".join([*_versions(), "", *_backends(), "", *_ops(), "", *_packages()])


def model_report(spec: str) -> str:
    """Which engine serves the model of PACKAGE.MODULE:FACTORY; with a batch, how exactly."""
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        hint = "name an importable module and a function in it"
        fail(ValueError, "doctor", "--model", "PACKAGE.MODULE:FACTORY", repr(spec), hint)
    with _current_folder_importable(), _users_code(spec):
        factory = getattr(importlib.import_module(module_name), name, None)
        if not callable(factory):
            expected = f"a function of {module_name}"
            hint = "name one that takes no arguments"
            fail(ValueError, "doctor", "--model", expected, repr(name), hint)
        result = factory()
        model, *batch = result if isinstance(result, tuple | list) and result else (result,)
        if not isinstance(model, torch.nn.Module) or len(batch) not in (0, 2):
            expected = "a module, or (module, inputs, labels)"
            got = describe(result)
            fail(TypeError, "doctor", f"what {name}() returns", expected, got, "return one of them")
        parts = [str(mts_fast.explain_engine(model, *batch))]
        if batch:
            parts.append(str(mts_fast.check_engine(model, *batch)))
    return "\n\n".join(parts)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _users_code(spec: str) -> Iterator[None]:
    """Turn any error of the user's module or model into one line with its file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if str(error).startswith("doctor: "):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        got = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        hint = "mend it, or run `mts-fast -v doctor` for the traceback"
        if isinstance(error, ModuleNotFoundError):
            hint = "run this in the folder that holds it, or install it"
        raise RuntimeError(
            f"doctor: --model {spec} must be a model that runs, got {got}; {hint}"
        ) from error


def _versions() -> list[str]:
    gpu = "none"
    if torch.cuda.is_available():
        try:
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            gpu = ", ".join(f"{card.name} (sm_{card.major}{card.minor})" for card in cards)
        except RuntimeError as error:  # the driver is in a bad state: part of the report
            gpu = str(error).partition("\n")[0]
    built = torch.version.cuda or "CPU only"
    return [
        f"mts_fast {mts_fast.__version__}   Python {platform.python_version()}   "
        f"torch {torch.__version__} (built for CUDA: {built})",
        f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads   "
        f"GPU: {gpu}",
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
    return f", {how}: no GPU has timed its kernels yet, so 'auto' does not take them"


def _ops() -> list[str]:
    ops = [f"  {op:<28} {', '.join(backends)}" for op, backends in registry.registered().items()]
    return ["ops and their implementations", *ops, f"engines: {', '.join(ENGINES)}"]


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
