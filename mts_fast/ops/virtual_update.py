"""virtual_update: what one step of a live torch optimizer would do, without doing it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    FLOATING_DTYPES,
    check_device,
    check_floating,
    check_number,
    describe,
    fail,
)
from mts_fast._columns import (
    Column,
    any_requires_grad,
    are_present,
    are_strided,
    are_tensors,
    as_column,
    at,
    detached,
    devices_of,
    dtypes_of,
    end_to_end,
    put,
    shapes_of,
)
from mts_fast.backends import flat
from mts_fast.backends.cpp import virtual_update as cpp
from mts_fast.backends.registry import register, register_flat, register_triton, resolve
from mts_fast.backends.triton import virtual_update as triton
from mts_fast.ops.update_rules import (
    check_optimizer,
    checked_groups,
    live_groups,
    rule_of,
    trainable_parameters,
)
from mts_fast.reference.update_rules import largest_gradient
from mts_fast.reference.update_rules.states import States, anew, samples, states_at
from mts_fast.reference.virtual_update import State, masked_direction

__all__ = [
    "ScaledDirection",
    "VirtualUpdate",
    "check_optimizer",
    "optimizer_states",
    "trainable_parameters",
    "virtual_update",
]

OP = "virtual_update"
DIRECTION = "hypergradient_direction"
ALONG = "virtual_update_along"
FLOATING = set(FLOATING_DTYPES)


def rules_of(states: Sequence[State]) -> str:
    """The update rules of these states: the variant of an op, whose kernel depends on them."""
    return "+".join(sorted({type(state).__name__ for state in samples(states)}))


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
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """(kappa^T along, counts of masked entries)."""
    rows = zip(parameters, gradients, states, along, strict=True)
    made = [masked_direction(*row, hypergradient_lr, largest) for row in rows]
    return [direction for direction, _ in made], [n.sum() for _, n in made if n is not None]


def _composed(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[State],
    along: Sequence[Tensor],
    hypergradient_lr: float | None,
    largest: Tensor,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Unfused: the two ops in turn. A fused implementation returns the same values."""
    rows = parameters, gradients, states
    rules = rules_of(states)
    updated = resolve(OP, end_to_end(parameters, gradients), rules)(*rows)
    run = resolve(DIRECTION, end_to_end(parameters, gradients, along), rules)
    return updated, *run(*rows, along, hypergradient_lr, largest)


register(OP, "reference", _updates)
register(DIRECTION, "reference", _directions)
register(ALONG, "reference", _composed)
register_flat(OP, flat.virtual_update)
register_flat(DIRECTION, flat.hypergradient_direction)
register(OP, "cpp", cpp.virtual_update, cpp.reasons)
register(DIRECTION, "cpp", cpp.hypergradient_direction, cpp.reasons)
register_triton(OP, triton.virtual_update, triton.reasons)
register_triton(DIRECTION, triton.hypergradient_direction, triton.reasons)
register_triton(ALONG, triton.virtual_update_along, triton.reasons)


class ScaledDirection(list[Tensor]):
    """kappa * v, one tensor per parameter: a list that also counts its masked entries."""

    def __init__(self, tensors: Sequence[Tensor], counts: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._counts = list(counts)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScaledDirection:
        """Other tensors, and the same count."""
        return ScaledDirection(tensors, self._counts)

    @functools.cached_property
    def masked_entries(self) -> Tensor:
        """[] int64: entries whose kappa was set to 0, since their gradient is rounding noise or
        they never had one. 0 under rules without a second moment. Nothing waits for a device."""
        device = self[0].device
        if not self._counts:
            return torch.zeros((), dtype=torch.int64, device=device)
        return torch.stack([c.sum(dtype=torch.int64).to(device) for c in self._counts]).sum()


@dataclass(frozen=True)
class VirtualUpdate:
    """theta' of every trainable parameter, and kappa to carry a gradient at theta' back to g."""

    parameters: list[Tensor]
    direction: ScaledDirection | None  # kappa * along, where `along` was given
    _before: Column  # tensors of its own, whose layout nobody changes
    _gradients: list[Tensor | None]
    _states: Sequence[State]
    _most: Tensor | None = None  # max |g|, where these gradients are a part of all

    def scale(
        self, direction: Sequence[Tensor | None], hypergradient_lr: float | None = None
    ) -> ScaledDirection:
        """kappa * direction, tensor by tensor; 0 where there was no gradient or no direction.

        Call it before the real step: the optimizer's state is read, not copied. The list has
        `masked_entries`, how many entries of kappa were taken for noise and set to 0.
        """
        _check_like("direction", direction, self._before)
        _check_lr(hypergradient_lr)
        scaled: list[Tensor | None] = [None] * len(direction)
        counts: list[Tensor] = []
        moved = _present(self._gradients, direction)
        if moved:
            columns = (self._before, self._gradients, direction)
            p, g, v = (_select(moved, column) for column in columns)
            most = self._most
            largest = _largest(self._states, self._gradients) if most is None else most
            states = states_at(anew(self._states), moved)
            run = resolve(DIRECTION, end_to_end(p, g, v), rules_of(states))
            kappa_v, counts = run(p, g, states, v, hypergradient_lr, largest)
            put(scaled, moved, kappa_v)
        return ScaledDirection(_or_zeros(scaled, self._before), counts)


def virtual_update(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Tensor | None],
    *,
    along: Sequence[Tensor | None] | None = None,
    hypergradient_lr: float | None = None,
    largest: Tensor | None = None,
) -> VirtualUpdate:
    """One optimizer step out of place: theta' = U(theta, gradients; live optimizer state).

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop, NAdam, RAdam or Muon of torch.optim with any of their
            options but `differentiable`, or one added by `register_update_rule`, with any number of
            parameter groups. Only read.
        gradients: one per trainable parameter, in the order of the groups, of the parameter's
            shape; None where a parameter had none (it stays as it is, as in torch).
        along: v, likewise; asks for kappa * v from the same pass.
        hypergradient_lr: replaces the learning rate in kappa only (the paper's pseudo_lr).
        largest: [], max |g| of the whole model where these gradients are shards of it; by default
            their own.

    Returns:
        VirtualUpdate: `.parameters`, theta' as new tensors; `.scale(v, hypergradient_lr)`,
        kappa^T v with kappa = -d theta'/d gradients, 0 where there is no gradient or no v; and
        `.direction`, that of `along`, None without it. All in the parameters' dtypes.

    Raises:
        TypeError: an optimizer without a rule, or one whose step was overridden or replaced;
            gradients or `along` not a list of dense floating-point tensors; options that are no
            numbers.
        ValueError: `differentiable`, `capturable` off a GPU, options that are NaN, negative or out
            of range, state of another shape, no trainable parameter, no gradient at all, differing
            shapes or devices, a hypergradient_lr without `along`.

    Notes:
        Never writes: parameters, `.grad`, momentum buffers and moments stay as they are.

        kappa is the exact derivative, but 0 where it would multiply rounding noise: where the root
        of the second moment, sqrt(v_hat), is below 8 eps max |g|, the maximum over all gradients of
        the call, or is 0; eps is that of the gradient's dtype, float32's for 16-bit ones. A bias
        before BatchNorm is the common case: its gradient is 0 but for rounding, its kappa about
        lr / eps. `.scale(v).masked_entries` counts them. Where a gradient is NaN or infinite, only
        exact zeros are masked, so that the NaN shows.

        With eps=0 an entry whose second moment is 0 has theta' = 0/0, NaN, as torch's step has.

        The Triton kernel (`use_backend("triton")`) serves SGD, Adam and AdamW without amsgrad in
        float32, float64, bfloat16 and float16, computes in float32 (float64 of float64) and is one
        launch for all tensors that share dtypes and alignment. Other rules, and a tensor whose
        memory layout is not that of its gradient, state and v, or has gaps, run on the reference,
        one by one.

    Source: row 4 and the definition of kappa.

    Example:
        >>> import torch, mts_fast
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([theta], lr=0.1)
        >>> mts_fast.virtual_update(sgd, [torch.tensor([1.0, 2.0])]).parameters[0].tolist()
        [0.8999999761581421, 0.800000011920929]
    """
    rule, groups = checked_groups(optimizer, OP, "optimizer")
    parameters = end_to_end(*(group.parameters for group in groups))
    if isinstance(gradients, list | tuple) and are_present(gradients):
        gradients = Column(gradients)
    _check_like("gradients", gradients, parameters)
    if all(g is None for g in gradients):
        hint = "the loss does not depend on any parameter of the optimizer"
        fail(ValueError, OP, "gradients", "given for at least one parameter", "none", hint)
    if along is not None:
        _check_like("along", along, parameters)
    elif hypergradient_lr is not None:
        hint = "without it, give it to .scale()"
        fail(ValueError, OP, "hypergradient_lr", "given together with along", "alone", hint)
    _check_lr(hypergradient_lr)
    states = States([rule.read_all(group.options, group.states) for group in groups])
    before = detached(parameters)
    after, direction = _run(before, gradients, states, along, hypergradient_lr, largest)
    # `before` and `states` are not copies: `.scale` has to be called before the real step
    return VirtualUpdate(after, direction, before, list(gradients), states, largest)


@torch.no_grad()
def _run(
    before: Column,
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
    along: Sequence[Tensor | None] | None,
    hypergradient_lr: float | None,
    most: Tensor | None,
) -> tuple[list[Tensor], ScaledDirection | None]:
    """(theta', kappa along): in one pass where `along` is given, theta' alone elsewhere."""
    g = _without_graph(gradients)
    v = [None] * len(before) if along is None else _without_graph(along)
    after = [p.clone() if t is None else p for p, t in zip(before, g, strict=True)]
    direction: list[Tensor | None] = [None] * len(before)
    counts: list[Tensor] = []
    both = [] if along is None else _present(g, v)
    plain = sorted(set(_present(g)).difference(both))
    if plain:
        columns, rows = [_select(plain, before), _select(plain, g)], states_at(states, plain)
        run = resolve(OP, end_to_end(*columns), rules_of(rows))
        put(after, plain, run(*columns, rows))
    if both:
        columns, rows = (
            [_select(both, column) for column in (before, g, v)],
            states_at(states, both),
        )
        largest = _largest(states, g) if most is None else most
        run = resolve(ALONG, end_to_end(*columns), rules_of(rows))
        updated, scaled, counts = run(*columns[:2], rows, columns[2], hypergradient_lr, largest)
        put(after, both, updated)
        put(direction, both, scaled)
    if along is None:
        return after, None
    return after, ScaledDirection(_or_zeros(direction, before), counts)


def _without_graph(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if are_present(tensors):
        column = as_column(tensors)  # type: ignore[arg-type]
        return detached(column) if any_requires_grad(column) else column
    return [t.detach() if t is not None and t.requires_grad else t for t in tensors]


def _present(*columns: Sequence[Tensor | None]) -> list[int]:
    """Where all columns have a tensor."""
    if all(map(are_present, columns)):
        return list(range(len(columns[0])))
    return [i for i, row in enumerate(zip(*columns, strict=True)) if are_present(row)]


def _largest(states: Sequence[State], gradients: Sequence[Tensor | None]) -> Tensor:
    """max |g| of the whole call; an unused 0 where no rule has a second moment."""
    if any(state.has_second_moment for state in samples(states)):
        return largest_gradient(g for g in gradients if g is not None)
    return torch.zeros(())


def _select(indices: list[int], column: Sequence[Tensor | None]) -> Column:
    """The tensors at these indices, where there are some."""
    selected = at(column, indices)
    return as_column(selected)  # type: ignore[arg-type]


def _or_zeros(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)]


def _check_like(arg: str, tensors: object, parameters: Sequence[Tensor]) -> None:
    """One per parameter, of its shape and on its device, dense and floating-point, or None."""
    expected = f"one per trainable parameter ({len(parameters)})"
    hint = "give a list in the order of the optimizer's groups, with None where there is none"
    if not isinstance(tensors, list | tuple):
        fail(TypeError, OP, arg, f"a list, {expected}", describe(tensors), hint)
    if len(tensors) != len(parameters):
        fail(ValueError, OP, arg, expected, len(tensors), hint)
    # the usual case, without a loop over hundreds of tensors
    if (
        are_tensors(tensors)
        and dtypes_of(tensors) <= FLOATING
        and shapes_of(tensors) == shapes_of(parameters)
        and devices_of(tensors) == devices_of(parameters)
        and len(devices_of(parameters)) == 1
        and are_strided(tensors)
    ):
        return
    for i, (parameter, tensor) in enumerate(zip(parameters, tensors, strict=True)):
        if tensor is None:
            continue
        check_floating(OP, f"{arg}[{i}]", tensor)
        if tensor.shape != parameter.shape:
            expected = f"of shape {tuple(parameter.shape)}"
            hint = f"parameter {i} of mts_fast.ops.trainable_parameters(optimizer) has that shape"
            fail(ValueError, OP, f"{arg}[{i}]", expected, tuple(tensor.shape), hint)
        check_device(OP, f"{arg}[{i}]", tensor, parameter.device, f"parameter {i}")


def _check_lr(hypergradient_lr: float | None) -> None:
    if hypergradient_lr is not None:
        hint = "None takes the optimizer's own lr"
        check_number(OP, "hypergradient_lr", hypergradient_lr, at_least=0.0, hint=hint)


def optimizer_states(optimizer: torch.optim.Optimizer) -> dict[Tensor, State]:
    """Hyper-parameters and live state of every trainable parameter, in the order of the groups."""
    rule = rule_of(OP, "optimizer", optimizer)
    states: dict[Tensor, State] = {}
    for group in live_groups(optimizer):
        read = rule.read_all(group.options, group.states)
        states.update(zip(group.parameters, read, strict=True))
    return states
