"""One recorded use of a parameter in a forward, and the error for forwards that are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mts_fast.hypergradient.ghost.rules import LayerCall
from mts_fast.hypergradient.ghost.source import ParameterSource
from mts_fast.hypergradient.refused import Refused


class Unsupported(Refused):
    """The ghost engine cannot serve this forward; `reasons` say why."""

    def __init__(self, reasons: Iterable[str]) -> None:
        super().__init__("ghost", list(reasons))


@dataclass
class RecordedCall:
    """One recorded use: a layer call, or (call None) a copy per sample of a parameter's image."""

    call: LayerCall | None
    sources: dict[str, ParameterSource]  # argument name -> its origin; "value" for a copy
    output: GradientEdge | None  # None once the graph is released
    shape: torch.Size
    path: str  # of a parameter in use
    value: Tensor | None = None  # the tensor that was copied
    _input: tuple[Tensor, int] | None = None  # layer input and its version when it was used

    @property
    def edge(self) -> GradientEdge:
        """Where b arrives in the graph."""
        assert self.output is not None
        return self.output

    def release(self) -> None:
        """Drop the references to the call and its input."""
        self.call = self._input = None

    def is_first(self) -> bool:
        """Whether the backward ends here: no gradient is required of the input."""
        return self._input is None or not self._input[0].requires_grad

    def input_was_changed(self) -> bool:
        """Whether something wrote into the layer's input after the call."""
        return self._input is not None and self._input[0]._version != self._input[1]

    def output_tangent(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """The output's tangent for parameter tangents, given by id of the parameter."""
        images = {n: s.image(tangents[id(s.parameter)]) for n, s in self.sources.items()}
        return images["value"] if self.call is None else self.call.replay(images)

    def parameter_gradients(self, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(parameter, gradient) pairs for the output cotangent b."""
        call = self.call
        by_name = call.weight_gradients(b) if call is not None else {"value": self._summed(b)}
        return [(s.parameter, s.pullback(by_name[n])) for n, s in self.sources.items()]

    def _summed(self, b: Tensor) -> Tensor:
        """The gradient of all copies, in the shape of the copied tensor."""
        assert self.value is not None
        if b.ndim == self.value.ndim:
            return b.sum(0, keepdim=True)
        return b.sum(list(range(b.ndim - self.value.ndim)))


def add_gradients(
    total: dict[Tensor, Tensor], pairs: Iterable[tuple[Tensor, Tensor]]
) -> dict[Tensor, Tensor]:
    """Add (parameter, gradient) pairs to sums by parameter, in its dtype."""
    for parameter, g in pairs:
        g = g.to(parameter.dtype)
        total[parameter] = total[parameter] + g if parameter in total else g
    return total
