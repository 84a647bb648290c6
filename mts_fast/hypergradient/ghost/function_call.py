"""Any function of parameters and activations, by torch's own derivatives of that function alone.

Its tangent is a forward-mode product, its gradient a backward one, both with the activations held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mts_fast.hypergradient.ghost.calls import Call, swapped
from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart
from mts_fast.hypergradient.ghost.rules import LayerCall, LayerRule
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.source import ParameterSource

# a parameter without a gradient (its dtype alone is read) has one of 0
_UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


@dataclass
class FunctionCall(LayerCall):
    """A call without a rule of its own; `positional` and `keywords` are its arguments, detached."""

    positional: Sequence[Any] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, call: Call, tracked: Mapping[int, ParameterSource]) -> FunctionCall:
        """The call with the tensors of these ids as its parameters."""
        sources: dict[str, ParameterSource] = {}
        used: dict[int, Tensor] = {}
        twins: dict[int, Tensor] = {}

        def held(t: Tensor) -> Tensor:
            if id(t) not in twins:
                twins[id(t)] = t.detach()
                if id(t) in tracked:
                    sources[str(len(used))] = tracked[id(t)]
                    used[id(t)] = twins[id(t)]
            return twins[id(t)]

        positional, keywords = swapped(list(call.args), held), swapped(call.kwargs, held)
        positions = {name: int(name) for name in sources}
        rule = LayerRule(
            call.function,
            positions,
            tangent=_tangent,
            weight_gradient=_weight_gradient,
            sample_parts=_sample_parts,
        )
        return cls(rule, tuple(used.values()), {}, sources, positional, keywords)

    def run(self, replaced: Mapping[str, Tensor | None]) -> Tensor:
        """The function with other tensors in place of its parameters."""
        others = {id(self.args[int(name)]): t for name, t in replaced.items()}

        def held(t: Tensor) -> Tensor:
            other = others.get(id(t))
            return t if other is None else other

        positional, keywords = (
            swapped(list(self.positional), held),
            swapped(dict(self.keywords), held),
        )
        return self.rule.function(*positional, **keywords)

    def unsupported(self) -> str | None:
        """Why it cannot be run again, or None."""
        return None


def _tangent(call: LayerCall, directions: Mapping[str, Tensor]) -> Tensor:
    """By forward mode; by two backward passes where the function has none."""
    parameters = {name: call.argument(name) for name in directions}
    tangents = {name: v.to(parameters[name].dtype) for name, v in directions.items()}
    try:
        with torch.no_grad(), forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(parameters[n], v) for n, v in tangents.items()}
            y, tangent = forward_ad.unpack_dual(call.run(duals))
            return torch.zeros_like(y) if tangent is None else tangent
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return _twice_transposed(call, parameters, tangents)


def _twice_transposed(
    call: LayerCall, parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> Tensor:
    with torch.enable_grad():
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        y = call.run(leaves)
        u = torch.zeros_like(y, requires_grad=True)
        gradients = torch.autograd.grad(y, list(leaves.values()), u, create_graph=True)
        return torch.autograd.grad(gradients, u, list(tangents.values()))[0]


def _leaves_and_output(call: LayerCall) -> tuple[dict[str, Tensor], Tensor]:
    with torch.enable_grad():
        leaves = {name: call.argument(name).detach().requires_grad_() for name in call.sources}
        return leaves, call.run(leaves)


def _weight_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    leaves, y = _leaves_and_output(call)
    gradients = torch.autograd.grad(y, list(leaves.values()), b.to(y.dtype), **_UNUSED)
    return dict(zip(leaves, gradients, strict=True))


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart]:
    """Each sample's gradient with the others' b at 0: B backward passes of the function."""
    leaves, y = _leaves_and_output(call)
    rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for i in range(size):
        alone = axis.alone(b, i, size).to(y.dtype)
        gradients = torch.autograd.grad(
            y, list(leaves.values()), alone, retain_graph=True, **_UNUSED
        )
        for name, g in zip(leaves, gradients, strict=True):
            rows[name].append(g.flatten())
    return {name: DensePart(torch.stack(gradients)) for name, gradients in rows.items()}
