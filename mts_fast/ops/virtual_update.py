"""virtual_update: what one step of a live torch optimizer would do, without doing it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import fail
from mts_fast.ops import virtual_update_cpp
from mts_fast.ops.registry import register, resolve
from mts_fast.reference.virtual_update import AdamState, SGDState, State

OP = "virtual_update"
register(
    OP,
    "reference",
    lambda parameters, gradients, states: list(
        map(reference.virtual_update, parameters, gradients, states)
    ),
)
register(OP, "cpp", virtual_update_cpp.virtual_update, virtual_update_cpp.reasons)
SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class VirtualUpdate:
    """theta' of every trainable parameter, and kappa to carry a gradient at theta' back to g."""

    parameters: list[Tensor]
    _before: list[Tensor]
    _gradients: list[Tensor | None]
    _states: list[State]

    def scale(
        self, direction: Sequence[Tensor | None], hypergradient_lr: float | None = None
    ) -> list[Tensor]:
        """kappa * direction, tensor by tensor; 0 where there was no gradient or no direction."""
        return [
            torch.zeros_like(parameter)
            if gradient is None or v is None
            else reference.kappa(parameter, gradient, state, hypergradient_lr) * v
            for parameter, gradient, state, v in zip(
                self._before, self._gradients, self._states, direction, strict=True
            )
        ]


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer would step, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def virtual_update(
    optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]
) -> VirtualUpdate:
    """One optimizer step out of place: theta' = U(theta, gradients; live optimizer state).

    Args:
        optimizer: torch.optim.SGD (momentum, dampening, nesterov, weight decay, maximize), Adam or
            AdamW (no amsgrad), with any number of parameter groups. Only read.
        gradients: one per trainable parameter, in the order of the groups, of the parameter's
            shape and dtype; None where a parameter had none (it stays as it is, as in torch).

    Returns:
        VirtualUpdate: `.parameters`, theta' as new tensors, and `.scale(v, hypergradient_lr)`,
        kappa * v with kappa = -d theta'/d gradients.

    Raises:
        TypeError: an optimizer of another type, or one whose step was overridden.
        ValueError: amsgrad, no trainable parameter, no gradient at all, or differing shapes.

    Notes:
        Never writes: parameters, `.grad`, momentum buffers and moments stay as they are.

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
    if len(gradients) != len(parameters):
        expected = f"one per trainable parameter ({len(parameters)})"
        fail(ValueError, OP, "gradients", expected, len(gradients))
    if all(g is None for g in gradients):
        hint = "the loss does not depend on any parameter of the optimizer"
        fail(ValueError, OP, "gradients", "given for at least one parameter", "none", hint)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and gradient.shape != parameter.shape:
            expected = f"of shape {tuple(parameter.shape)}"
            fail(ValueError, OP, "gradients", expected, tuple(gradient.shape))
    states = list(optimizer_states(optimizer).values())
    before = [p.detach() for p in parameters]
    moved = [i for i, g in enumerate(gradients) if g is not None]
    given = [before[i] for i in moved], [g.detach() for g in gradients if g is not None]
    with torch.no_grad():
        after = [p.clone() if g is None else p for p, g in zip(before, gradients, strict=True)]
        run = resolve(OP, [*given[0], *given[1]])
        for i, updated in zip(moved, run(*given, [states[i] for i in moved]), strict=True):
            after[i] = updated
    # kappa is asked for before the real step; the values must be those of now.
    return VirtualUpdate(after, before, list(gradients), states)


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
    """A float where that costs nothing; on a GPU a float64 tensor, so that nothing waits."""
    if isinstance(step, Tensor):
        return step.double() if step.is_cuda else step.item()
    return step
