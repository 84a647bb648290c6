"""A recorded request as a call: random tensors of its shapes, and every other argument."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mts_fast.backends.verdicts.requests import Request, Shape
from mts_fast.ops.cross_entropy import STATISTICS
from mts_fast.ops.norm_sample_gradients import BIAS, CENTERED, groups_of_variant
from mts_fast.reference import AdamState, SGDState, Target

# torch's default of its norms
NORM_EPS = 1e-5
# what the states of a request are made with; a decay, so that parameters are read
RULES: dict[str, Callable[[Tensor], Any]] = {
    "SGDState": lambda p: SGDState(0.1, 0.9, weight_decay=1e-4, buffer=torch.randn_like(p)),
    "AdamState": lambda p: AdamState(
        1e-3,
        weight_decay=1e-2,
        decoupled=True,
        exp_avg=torch.randn_like(p),
        exp_avg_sq=torch.rand_like(p),
        step=10.0,
    ),
}


@dataclass(frozen=True)
class Case:
    """A call of an op: its arguments, and the tensors that a backward is for."""

    device: torch.device
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    leaves: tuple[Tensor, ...] = ()

    def run(self, function: Callable[..., Any]) -> list[Tensor]:
        """All results of floating point; with leaves also the gradients of the first result."""
        with torch.set_grad_enabled(bool(self.leaves)):
            results = _tensors(function(*self.arguments, **self.options))
            if not self.leaves:
                return results
            gradients = torch.autograd.grad(results[0].sum(), self.leaves)
        return [*(t.detach() for t in results), *gradients]

    def in_float64(self) -> Case:
        """The same call on the same numbers in float64."""
        leaves = {id(t): t.detach().double().requires_grad_() for t in self.leaves}
        return Case(
            self.device,
            tuple(_double(value, leaves) for value in self.arguments),
            {name: _double(value, leaves) for name, value in self.options.items()},
            tuple(leaves.values()),
        )


def _tensors(result: Any) -> list[Tensor]:
    """All floating-point tensors of a result, in their order, without empty ones. Counts are left
    out: backends count by tensor or by block."""
    if isinstance(result, Tensor):
        return [result] if result.numel() and result.is_floating_point() else []
    if isinstance(result, Sequence):
        return [t for part in result for t in _tensors(part)]
    if hasattr(result, "__dataclass_fields__"):
        return [t for f in fields(result) for t in _tensors(getattr(result, f.name))]
    return []


def _double(value: Any, leaves: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return leaves.get(id(value), value.double() if value.is_floating_point() else value)
    if isinstance(value, Target):
        return Target(*(_double(part, leaves) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(_double(part, leaves) for part in value)
    if isinstance(value, SGDState | AdamState):
        tensors = {name: _double(getattr(value, name), leaves) for name in value.tensors}
        return replace(value, **tensors)
    return value


def case_of(request: Request, device: torch.device) -> Case | None:
    """The call of a request, the same at every time; None for an op that is not timed here."""
    make = _MAKERS.get(request.op)
    if make is None:
        return None
    generator = torch.Generator(device).manual_seed(zlib.crc32(request.key.encode()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        tensors = [_tensor(shape, device, generator) for shape in request.tensors]
        return make(request, tensors)


def _tensor(shape: Shape, device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal numbers in this memory layout; entries may share memory, as after `expand`."""
    dtype = getattr(torch, shape.dtype)
    shift = shape.shift // dtype.itemsize
    steps = zip(shape.size, shape.stride, strict=True)
    extent = shift + 1 + sum((n - 1) * stride for n, stride in steps)
    memory = torch.randn(extent, device=device, generator=generator).to(dtype)
    return memory.as_strided(shape.size, shape.stride, shift)


def _labels(logits: Tensor, classes: int) -> Tensor:
    return torch.randint(classes, logits.shape[:-1], device=logits.device)


def _leaves(request: Request, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in tensors) if request.backward else ()


def _cross_entropy(request: Request, tensors: list[Tensor]) -> Case:
    (logits,) = tensors
    target = Target(_labels(logits, logits.shape[-1]))
    leaves = _leaves(request, logits)
    if request.op == "cross_entropy":
        return Case(logits.device, (logits, target), {}, leaves)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = torch.rand(len(logits), device=logits.device, dtype=dtype).softmax(0)
    options = {"statistics": request.variant == STATISTICS}
    return Case(logits.device, (logits, target, p), options, leaves)


def _linear_cross_entropy(request: Request, tensors: list[Tensor]) -> Case:
    # logits of a trained model's size
    hidden, weight = (t * t.shape[-1] ** -0.25 for t in tensors)
    target = Target(_labels(hidden, len(weight)))
    arguments = (hidden, weight, None, target)
    if request.op == "linear_cross_entropy":
        return Case(hidden.device, arguments, {}, _leaves(request, hidden, weight))
    along = {"weight_tangent": torch.randn_like(weight), "bias_tangent": None}
    return Case(hidden.device, arguments, along)


def _dot(request: Request, tensors: list[Tensor]) -> Case:
    bias = tensors[3] if len(tensors) > 3 else None
    return Case(tensors[0].device, (*tensors[:3], bias))


def _sample_dot(request: Request, tensors: list[Tensor]) -> Case:
    return Case(tensors[0].device, tuple(tensors))


def _layer_norm(request: Request, tensors: list[Tensor]) -> Case:
    options = request.variant.split("+")
    arguments = (*tensors, NORM_EPS, CENTERED in options, BIAS in options)
    return Case(tensors[0].device, arguments)


def _group_norm(request: Request, tensors: list[Tensor]) -> Case:
    x, b, *moments = tensors
    if moments:
        moments[1] = moments[1].square()  # a variance
    arguments = (x, b, groups_of_variant(request.variant), NORM_EPS, *moments)
    return Case(x.device, arguments)


def _update(request: Request, tensors: list[Tensor]) -> Case | None:
    rules = [RULES.get(name) for name in request.variant.split("+")]
    columns = 2 if request.op == "virtual_update" else 3
    count = len(tensors) // columns
    p, g, *along = (tensors[i * count : (i + 1) * count] for i in range(columns))
    # of several rules the parameters take turns
    states = [rule(t) for i, t in enumerate(p) if (rule := rules[i % len(rules)]) is not None]
    if len(states) < count:
        return None
    if not along:
        return Case(p[0].device, (p, g, states))
    largest = torch.stack([t.abs().max() for t in g if t.numel()]).max()
    return Case(p[0].device, (p, g, states, *along, None, largest))


def _global_norm(request: Request, tensors: list[Tensor]) -> Case:
    return Case(tensors[0].device, (tensors,))


def _perturb(request: Request, tensors: list[Tensor]) -> Case:
    count = len(tensors) // 2
    arguments = (tensors[:count], tensors[count : 2 * count], tensors[-1])
    return Case(tensors[0].device, arguments)


_MAKERS: dict[str, Callable[[Request, list[Tensor]], Case | None]] = {
    "cross_entropy": _cross_entropy,
    "weighted_cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_tangent": _linear_cross_entropy,
    "hypergradient_dot": _dot,
    "sample_dot": _sample_dot,
    "layer_norm_sample_gradients": _layer_norm,
    "group_norm_sample_gradients": _group_norm,
    "virtual_update": _update,
    "hypergradient_direction": _update,
    "virtual_update_along": _update,
    "global_norm": _global_norm,
    "perturb": _perturb,
}
