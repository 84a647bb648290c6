"""What a call asks of a device, and the least time in which the device's ceilings allow it.

The roofline model of Williams, Waterman and Patterson (2009), operator by operator: each takes at
least bytes / bandwidth and at least operations / rate, whichever is longer.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from operator_cost import flops_of, moved_bytes, name_of, read_by_launch, stored_bytes, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from mts_fast.backends import registry
from mts_fast.ops.perturb import NORM, PERTURB
from mts_fast.ops.virtual_update import ALONG, DIRECTION
from mts_fast.ops.virtual_update import OP as UPDATE

# ops of mts_fast whose Triton kernels are launched outside of torch's dispatcher
LAUNCHED = (NORM, PERTURB, UPDATE, DIRECTION, ALONG)


@dataclass(frozen=True)
class Operator:
    """One operator of a call: bytes read and written, and operations on `dtype`."""

    name: str
    bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None  # of a product, a convolution or attention


@dataclass(frozen=True)
class Roof:
    """Least seconds of a call, and those of them in operators that are bound by their bytes."""

    seconds: float
    memory_seconds: float


@dataclass(frozen=True)
class StepCost:
    """The operators with a kernel that ran in a call, those of its backward included."""

    operators: tuple[Operator, ...]

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(operator.bytes for operator in self.operators)

    @property
    def flops(self) -> int:
        """Floating-point operations of products, convolutions and attention."""
        return sum(operator.flops for operator in self.operators)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of products, convolutions and attention."""
        return {operator.dtype for operator in self.operators if operator.dtype is not None}

    def roof(self, bandwidth: float, rates: dict[torch.dtype, float]) -> Roof:
        """The least time, from bytes in a second, and operations in a second on each dtype."""
        seconds = memory_seconds = 0.0
        for operator in self.operators:
            moving = operator.bytes / bandwidth
            computing = operator.flops / rates[operator.dtype] if operator.flops else 0.0
            seconds += max(moving, computing)
            memory_seconds += moving if moving >= computing else 0.0
        return Roof(seconds, memory_seconds)


def step_cost(call: Callable[[], object]) -> StepCost:
    """The operators of one call.

    A replay of a CUDA graph runs none, and code under torch.compile those that it does not fuse.
    """
    counter = _Counter()
    with counter.of_launches(), counter:
        call()
    return StepCost(tuple(counter.operators))


def roofline_report(cost, seconds, bandwidth, rates):
    """Counts of a call that took `seconds`, and its share of the roof, for a benchmark's report.

    Args:
        cost: StepCost of the call.
        bandwidth: bytes that the device copies in a second.
        rates: operations of a product in a second, by dtype.
    """
    roof = cost.roof(bandwidth, rates)
    return {
        "GB": _digits(cost.bytes / 1e9),
        "GB/s": _digits(cost.bytes / seconds / 1e9),
        "copy GB/s": _digits(bandwidth / 1e9),
        "TFLOP": _digits(cost.flops / 1e12),
        "TFLOP/s": _digits(cost.flops / seconds / 1e12),
        "product TFLOP/s": {
            str(dtype).removeprefix("torch."): _digits(rates[dtype] / 1e12)
            for dtype in sorted(cost.dtypes, key=str)
        },
        "roof ms": _digits(1e3 * roof.seconds),
        "% of roof": round(100 * roof.seconds / seconds, 1),
        "% of roof by bytes": round(100 * roof.memory_seconds / roof.seconds, 1),
    }


def _digits(value):
    """Four significant digits."""
    return float(f"{value:.4g}")


class _Counter(TorchDispatchMode):
    """Records the operators that torch dispatches to a kernel."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self._launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        moved = 0 if self._launching else moved_bytes(func, args, kwargs, result)
        if moved:
            flops = flops_of(func, args, kwargs, result)
            floating = (t.dtype for t in tensors_of(args) if t.is_floating_point())
            dtype = next(floating) if flops else None
            self.operators.append(Operator(name_of(func), moved, flops, dtype))
        return result

    @contextmanager
    def of_launches(self) -> Iterator[None]:
        """A block in which the Triton kernels outside of torch's dispatcher are counted, too."""
        before = {op: registry._implementations[op].get("triton") for op in LAUNCHED}
        for op, kernel in before.items():
            if kernel is not None:
                function = self._counted(op, kernel.function)
                counted = dataclasses.replace(kernel, function=function)
                registry._implementations[op]["triton"] = counted
        try:
            yield
        finally:
            for op, kernel in before.items():
                if kernel is not None:
                    registry._implementations[op]["triton"] = kernel

    def _counted(self, op: str, function: Callable[..., object]) -> Callable[..., object]:
        """The function of an op, counted as one operator."""

        def run(*args):
            self._launching = True
            try:
                result = function(*args)
            finally:
                self._launching = False
            moved = stored_bytes(read_by_launch(op, args)) + stored_bytes(tensors_of(result))
            self.operators.append(Operator(op, moved))
            return result

        return run


def _is_composite(func):
    """Whether torch runs the operator as other operators: so it is dispatched in inference mode."""
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
