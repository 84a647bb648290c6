"""virtual_update: what one step of a live torch optimizer would do, without doing it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_device, check_floating, fail
from mts_fast._triton import kernel_devices
from mts_fast.ops import virtual_update_cpp, virtual_update_triton
from mts_fast.ops.registry import register, resolve, unmeasured
from mts_fast.reference.virtual_update import AdamState, SGDState, State

T = TypeVar("T")

OP = "virtual_update"
DIRECTION = "hypergradient_direction"
ALONG = "virtual_update_along"


def _updates(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State]
) -> list[Tensor]:
    return list(map(reference.virtual_update, parameters, gradients, states))


def _directions(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
) -> list[Tensor]:
    return [
        reference.hypergradient_direction(p, g, s, v, hypergradient_lr)
        for p, g, s, v in zip(parameters, gradients, states, along, strict=True)
    ]


def _composed(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """By whichever ops serve: what a fused one has to equal."""
    rows = parameters, gradients, states
    updated = resolve(OP, [*parameters, *gradients])(*rows)
    run = resolve(DIRECTION, [*parameters, *gradients, *along])
    return updated, run(*rows, along, hypergradient_lr)


register(OP, "reference", _updates)
register(DIRECTION, "reference", _directions)
register(ALONG, "reference", _composed)
register(OP, "cpp", virtual_update_cpp.virtual_update, virtual_update_cpp.reasons)
for _op, _function in (
    (OP, virtual_update_triton.virtual_update),
    (DIRECTION, virtual_update_triton.hypergradient_direction),
    (ALONG, virtual_update_triton.virtual_update_along),
):
    register(
        _op,
        "triton",
        _function,
        virtual_update_triton.reasons,
        devices=kernel_devices(),
        # no GPU has timed it: `auto` leaves it alone, `use_backend("triton")` takes it
        wins=unmeasured,
    )
SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class VirtualUpdate:
    """theta' of every trainable parameter, and kappa to carry a gradient at theta' back to g."""

    parameters: list[Tensor]
    direction: list[Tensor] | None  # kappa * along, where `along` was given
    _before: list[Tensor]
    _gradients: list[Tensor | None]
    _states: list[State]

    def scale(
        self, direction: Sequence[Tensor | None], hypergradient_lr: float | None = None
    ) -> list[Tensor]:
        """kappa * direction, tensor by tensor; 0 where there was no gradient or no direction."""
        _check_like("direction", direction, self._before)
        found: list[Tensor | None] = [None] * len(direction)
        pairs = zip(self._gradients, direction, strict=True)
        moved = [i for i, pair in enumerate(pairs) if all(t is not None for t in pair)]
        given = [_at(moved, c) for c in (self._before, self._gradients, direction)]
        if moved:
            run = resolve(DIRECTION, [t for column in given for t in column])
            states = _at(moved, self._states)
            kappa_v = run(given[0], given[1], states, given[2], hypergradient_lr)
            for i, tensor in zip(moved, kappa_v, strict=True):
                found[i] = tensor
        return _or_zeros(found, self._before)


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer would step, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def virtual_update(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Tensor | None],
    *,
    along: Sequence[Tensor | None] | None = None,
    hypergradient_lr: float | None = None,
) -> VirtualUpdate:
    """One optimizer step out of place: theta' = U(theta, gradients; live optimizer state).

    Args:
        optimizer: torch.optim.SGD (momentum, dampening, nesterov, weight decay, maximize), Adam or
            AdamW (no amsgrad), with any number of parameter groups. Only read.
        gradients: one per trainable parameter, in the order of the groups, of the parameter's
            shape and dtype; None where a parameter had none (it stays as it is, as in torch).
        along: v, likewise; asks for kappa * v from the same pass.
        hypergradient_lr: replaces the learning rate in kappa only (the paper's pseudo_lr).

    Returns:
        VirtualUpdate: `.parameters`, theta' as new tensors; `.scale(v, hypergradient_lr)`,
        kappa * v with kappa = -d theta'/d gradients, 0 where there is no gradient or no v; and
        `.direction`, that of `along`, None without it. All in the parameters' dtypes.

    Raises:
        TypeError: an optimizer of another type, or one whose step was overridden; `along` not of
            floating-point tensors.
        ValueError: amsgrad, no trainable parameter, no gradient at all, differing shapes or
            devices, a hypergradient_lr without `along`.

    Notes:
        Never writes: parameters, `.grad`, momentum buffers and moments stay as they are.
        The Triton kernel (`use_backend("triton")`) takes float32, float64, bfloat16 and float16,
        computes in float32 (float64 of float64) and is one launch for all tensors that share
        dtypes and alignment. A tensor that does not lie in memory like its gradient, state and v,
        or has gaps there, runs on the reference, one by one.

    Source: row 4 and the definition of kappa.

    Example:
        >>> import torch, mts_fast
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([theta], lr=0.1)
        >>> mts_fast.virtual_update(sgd, [torch.tensor([1.0, 2.0])]).parameters[0].tolist()
        [0.8999999761581421, 0.800000011920929]
    """
    check_optimizer(optimizer)
    parameters = trainable_parameters(optimizer)
    _check_like("gradients", gradients, parameters)
    if all(g is None for g in gradients):
        hint = "the loss does not depend on any parameter of the optimizer"
        fail(ValueError, OP, "gradients", "given for at least one parameter", "none", hint)
    if along is not None:
        _check_like("along", along, parameters)
    elif hypergradient_lr is not None:
        hint = "without it, give it to .scale()"
        fail(ValueError, OP, "hypergradient_lr", "given together with along", "alone", hint)
    states = list(optimizer_states(optimizer).values())
    before = [p.detach() for p in parameters]
    after, direction = _run(before, gradients, states, along, hypergradient_lr)
    # kappa is asked for before the real step; the values must be those of now.
    return VirtualUpdate(after, direction, before, list(gradients), states)


@torch.no_grad()
def _run(
    before: list[Tensor],
    gradients: Sequence[Tensor | None],
    states: list[State],
    along: Sequence[Tensor | None] | None,
    hypergradient_lr: float | None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """(theta', kappa along): together where both are asked for, theta' alone elsewhere."""
    detached = [None if g is None else g.detach() for g in gradients]
    v = [None if t is None else t.detach() for t in along or [None] * len(before)]
    after = [p.clone() if g is None else p for p, g in zip(before, gradients, strict=True)]
    direction: list[Tensor | None] = [None] * len(before)
    moved = [i for i, g in enumerate(gradients) if g is not None]
    plain, both = ([i for i in moved if (v[i] is None) == absent] for absent in (True, False))
    if plain:
        p, g = _at(plain, before), _at(plain, detached)
        updated = resolve(OP, [*p, *g])(p, g, _at(plain, states))
        for i, tensor in zip(plain, updated, strict=True):
            after[i] = tensor
    if both:
        p, g, w = (_at(both, column) for column in (before, detached, v))
        pair = resolve(ALONG, [*p, *g, *w])(p, g, _at(both, states), w, hypergradient_lr)
        for i, tensor, scaled in zip(both, *pair, strict=True):
            after[i], direction[i] = tensor, scaled
    return after, None if along is None else _or_zeros(direction, before)


def _at(indices: list[int], column: Sequence[T | None]) -> list[T]:
    """What is at the indices, where there is something."""
    return [t for i in indices if (t := column[i]) is not None]


def _or_zeros(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if t is None else t for t, p in zip(found, like, strict=True)]


def _check_like(arg: str, given: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """One per parameter, of its shape and on its device, or None."""
    if len(given) != len(parameters):
        fail(ValueError, OP, arg, f"one per trainable parameter ({len(parameters)})", len(given))
    for i, (parameter, tensor) in enumerate(zip(parameters, given, strict=True)):
        if tensor is None:
            continue
        check_floating(OP, f"{arg}[{i}]", tensor)
        if tensor.shape != parameter.shape:
            expected = f"of shape {tuple(parameter.shape)}"
            fail(ValueError, OP, arg, expected, tuple(tensor.shape))
        check_device(OP, arg, tensor, parameter.device, f"parameter {i}")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose step is not known, saying which and what to do."""
    known = [cls for cls in SUPPORTED if isinstance(optimizer, cls)]
    names = "torch.optim.SGD, Adam or AdamW"
    if not known:
        hint = "if it wraps one of these, pass the wrapped optimizer"
        fail(TypeError, OP, "optimizer", names, type(optimizer).__name__, hint)
    # torch wraps `step` of the first class of a family that is instantiated, subclass or not.
    step = inspect.unwrap(type(optimizer).step)
    if not any(step is inspect.unwrap(cls.step) for cls in known):
        got = f"{type(optimizer).__name__}, which overrides step()"
        fail(TypeError, OP, "optimizer", names, got, "its update cannot be differentiated here")
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        fail(ValueError, OP, "optimizer", "without amsgrad", "amsgrad=True", "set amsgrad=False")
    if not trainable_parameters(optimizer):
        hint = "set requires_grad on the parameters that shall learn"
        fail(ValueError, OP, "optimizer", "given trainable parameters", "none", hint)


def optimizer_states(optimizer: torch.optim.Optimizer) -> dict[Tensor, State]:
    """Hyper-parameters and live state of every trainable parameter, in the order of the groups."""
    return {
        parameter: _read(group, optimizer.state.get(parameter, {}))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }


def _read(group: dict, state: dict) -> State:
    if "momentum" in group:
        return SGDState(
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            buffer=state.get("momentum_buffer"),
        )
    return AdamState(
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group.get("decoupled_weight_decay", False),
        maximize=group["maximize"],
        exp_avg=state.get("exp_avg"),
        exp_avg_sq=state.get("exp_avg_sq"),
        step=_steps_taken(state.get("step", 0.0)),
    )


def _steps_taken(step: float | Tensor) -> float | Tensor:
    """A float where that costs nothing; on a GPU the tensor, so that nothing waits."""
    return step.item() if isinstance(step, Tensor) and not step.is_cuda else step
