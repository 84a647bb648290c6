"""Which implementation of an op runs: the registry, `use_backend`, and the reasons when none can.

Every op has a `reference` implementation. Some run the reference on many tensors at once (`flat`),
which `auto` takes on every device. A faster backend registers a function and a check that
returns the reasons why it cannot serve these tensors; `auto` takes the first that can and that was
measured to be faster: by this machine's verdicts (`mts-fast tune`), else by ours. A named backend
raises where its kernel cannot take the tensors; an op without a kernel for the device, or with an
option that the kernel lacks (label smoothing in C++), runs the reference.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mts_fast._check import check_choice, fail
from mts_fast._columns import devices_of
from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.eligibility import under_transform
from mts_fast.backends.triton.eligibility import kernel_devices, triton_reasons
from mts_fast.backends.verdicts.requests import Request, note, recording
from mts_fast.backends.verdicts.table import table_for

logger = logging.getLogger("mts_fast")

BACKENDS = ("auto", "reference", "triton", "cpp")
# order in which `auto` tries them; the reference can always run.
FASTER = ("triton", "cpp", "flat")
PREFERENCE = (*FASTER, "reference")
ENVIRONMENT_VARIABLE = "MTS_FAST_BACKEND"

Reasons = Callable[[Sequence[Tensor]], list[str]]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: the function, and the reasons why it cannot serve some tensors.

    It has kernels for the device types in `devices`. `auto` takes it only where it was measured to
    be faster; elsewhere it runs when its backend is named.
    """

    function: Callable[..., Any]
    reasons: Reasons
    devices: tuple[str, ...] | None  # None: all
    wins: Callable[[Sequence[Tensor]], bool]

    def has_kernel(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it has a kernel for the devices of these tensors."""
        if self.devices is None:
            return True
        # a comprehension, which torch.compile can trace
        compiling = torch.compiler.is_compiling()
        devices = {t.device for t in tensors} if compiling else devices_of(tensors)
        return all(device.type in self.devices for device in devices)

    def serves(self, tensors: Sequence[Tensor], verdict: bool | None) -> bool:
        """Whether `auto` takes it for these tensors; this machine's verdict replaces ours."""
        wins = verdict if verdict is not None else self.wins(tensors)
        return self.has_kernel(tensors) and wins and not self.reasons(tensors)


_implementations: dict[str, dict[str, Implementation]] = {}
_selected: ContextVar[str | None] = ContextVar("mts_fast_backend", default=None)
_announced: set[tuple[str, str]] = set()


def on_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are on the CPU, where the kernels of this version were measured."""
    return all(d.type == "cpu" for d in devices_of(tensors))


def unmeasured(tensors: Sequence[Tensor]) -> bool:
    """False: we have timed the Triton kernels on no GPU, so they run when Triton is named, or where
    this machine's verdicts say that they win."""
    return False


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    reasons: Reasons = lambda _: [],
    *,
    devices: tuple[str, ...] | None = ("cpu",),
    wins: Callable[[Sequence[Tensor]], bool] = on_cpu,
) -> None:
    """Add an implementation of `op`; `reasons(tensors)` is empty where it can run, and
    `wins(tensors)` says whether it was measured to be faster there."""
    check_choice("register", "backend", backend, PREFERENCE)
    implementation = Implementation(function, reasons, devices, wins)
    _implementations.setdefault(op, {})[backend] = implementation


def register_flat(op: str, function: Callable[..., Any]) -> None:
    """Add a form of the reference that runs many small tensors at once, on any device."""
    register(op, "flat", function, devices=None, wins=lambda _: True)


def register_triton(op: str, function: Callable[..., Any], reasons: Reasons) -> None:
    """Add the Triton kernel of `op` for the devices of `kernel_devices`; `auto` does not take it
    (see `unmeasured`)."""
    register(op, "triton", function, reasons, devices=kernel_devices(), wins=unmeasured)


def current_backend() -> str:
    """The backend in force: that of the last `use_backend` still in effect, else
    MTS_FAST_BACKEND, else `auto`."""
    selected = _selected.get()
    if selected is None:
        selected = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        check_choice("mts_fast", f"environment variable {ENVIRONMENT_VARIABLE}", selected, BACKENDS)
    return selected


class use_backend:
    """Run every op on one backend: inside a `with` block, inside a function that it decorates, or,
    as a plain call, from then on in this thread.

    Args:
        name: "auto", "reference", "triton" or "cpp".

    Raises:
        ValueError: for another name.
        RuntimeError: the backend cannot run here, with all the reasons. An op whose kernel cannot
            serve its tensors raises the same when it is called.

    Notes:
        It takes effect when it is called, as `torch.set_grad_enabled` does, and not when the block
        is entered. Other threads keep their backend, and new threads begin with MTS_FAST_BACKEND or
        "auto".

    Example:
        >>> import torch, mts_fast
        >>> with mts_fast.use_backend("reference"):
        ...     mts_fast.normalize_weights(torch.zeros(4)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, name: str) -> None:
        check_choice("use_backend", "name", name, BACKENDS)
        why = backend_reasons(name)
        if why:
            raise _cannot_run("use_backend", name, why, "use 'auto'")
        self.name = name
        self._before = _selected.get()
        self._entered = False
        _selected.set(name)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """The function, run under this backend; the backend before it is restored at once."""
        _selected.set(self._before)

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> R:
            with use_backend(self.name):
                return function(*args, **kwargs)

        return decorated

    def __enter__(self) -> None:
        if self._entered:
            got = f"use_backend({self.name!r}) for the second time"
            fail(RuntimeError, "use_backend", "block", "entered once", got, "call it anew")
        self._entered = True
        _selected.set(self.name)

    def __exit__(self, *error: object) -> None:
        _selected.set(self._before)


def triton_in_force() -> bool:
    """Whether Triton was named as the backend, and can run. torch.compile cannot trace into this
    function; it calls it once, when the code is traced."""
    return current_backend() == "triton" and not triton_reasons()


# the attribute that torch.compiler.assume_constant_result sets, without its import of dynamo
triton_in_force._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, tensors: Sequence[Tensor], variant: str = "") -> Callable[..., Any]:
    """The function that serves `op` on these tensors under the backend in force.

    `variant` tells calls apart that take other kernels for the same tensors; verdicts are by it.

    Under torch.compile the reference is traced, so that the compiler can fuse it, unless Triton was
    named: the graph then calls its kernels. Under torch.func and forward-mode differentiation the
    reference runs, too.
    """
    available = _implementations[op]
    if under_transform():
        return available["reference"].function
    if torch.compiler.is_compiling():
        kernel = available.get("triton")
        if kernel is None or not kernel.has_kernel(tensors) or not triton_in_force():
            return available["reference"].function
        return kernel.function
    backend = current_backend()
    verdicts = table_for(tensors[0].device)
    request = None
    if recording() or op in verdicts.ops:
        request = Request.of(op, variant, tensors)
        note(request)
    if backend != "auto":
        if _selected.get() is None and (why := backend_reasons(backend)):
            # a backend from the environment variable: nothing has checked yet that it can run
            raise _cannot_run(
                op, backend, why, f"unset {ENVIRONMENT_VARIABLE}, or set it to 'auto'"
            )
        chosen = available.get(backend, available["reference"])
        if chosen is available["reference"] or not chosen.has_kernel(tensors):
            return available["reference"].function
        why = chosen.reasons(tensors)
        if why:
            raise _cannot_run(op, backend, why, "use backend 'auto' or 'reference'")
        return chosen.function
    name = "reference"
    for candidate in FASTER:
        if candidate not in available:
            continue
        verdict = None if request is None else verdicts.wins(request, candidate)
        if available[candidate].serves(tensors, verdict):
            name = candidate
            break
    if (op, name) not in _announced:
        _announced.add((op, name))
        logger.info("%s runs on backend %r", op, name)
    return available[name].function


def _cannot_run(op: str, backend: str, why: Sequence[str], hint: str) -> RuntimeError:
    return RuntimeError(f"{op}: backend {backend!r} cannot run: {'; '.join(why)}; {hint}")


def kernel_for(op: str, tensors: Sequence[Tensor], variant: str = "") -> Callable[..., Any] | None:
    """The function that serves `op` on these tensors; None where it is the reference."""
    function = resolve(op, tensors, variant)
    return None if function is _implementations[op]["reference"].function else function


def has_kernels(op: str, device: torch.device) -> bool:
    """Whether any backend has a kernel of `op` for tensors on this device, wherever it wins."""
    return any(
        implementation.devices is None or device.type in implementation.devices
        for name, implementation in _implementations[op].items()
        if name != "reference"
    )


def backend_reasons(backend: str) -> list[str]:
    """Why no kernel of a backend can run in this process; empty where they can."""
    if backend == "cpp" and not extension().available:
        return [extension().reason]
    return list(triton_reasons()) if backend == "triton" else []


def tunable(op: str, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Backends with a kernel of `op` that can serve these tensors, whether or not it wins."""
    return tuple(
        name
        for name in FASTER
        if name != "flat"  # always taken: a few launches for many
        and (kernel := _implementations.get(op, {}).get(name)) is not None
        and kernel.has_kernel(tensors)
        and not kernel.reasons(tensors)
    )


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function of one backend."""
    return _implementations[op][backend].function


def without(op: str, backend: str, tensors: Sequence[Tensor]) -> tuple[str, Callable[..., Any]]:
    """(name, function): what `auto` takes for these tensors where this backend is passed over."""
    available = _implementations[op]
    for name in FASTER:
        if name in available and name != backend and available[name].serves(tensors, None):
            return name, available[name].function
    return "reference", available["reference"].function


def registered() -> dict[str, tuple[str, ...]]:
    """Every op with its backends, for the doctor."""
    return {
        op: tuple(name for name in reversed(PREFERENCE) if name in by_backend)
        for op, by_backend in sorted(_implementations.items())
    }
