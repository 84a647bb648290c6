"""One recorded use of a parameter in a forward, and its part of the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mts_fast.hypergradient.ghost.reasons import Reason
from mts_fast.hypergradient.ghost.rules import LayerCall
from mts_fast.hypergradient.ghost.source import ParameterSource


@dataclass
class RecordedCall:
    """One recorded use: a call, or (call None) a derived tensor that has entries of its own for
    every sample (a class token, expanded)."""

    call: LayerCall | None
    sources: dict[str, ParameterSource]  # argument name -> its origin; "value" without a call
    output: GradientEdge | None  # None once the graph is released
    shape: torch.Size
    path: str  # of a parameter in use
    paths: frozenset[str]  # of all of them
    is_first: bool = True  # the backward ends here: no gradient is required of the input
    in_sum: bool = True  # whether autograd's gradient of the root has this use's part
    rows: Tensor | None = None  # the sample [n] of every row of the output, where it was routed
    _held: tuple[tuple[Tensor, int], ...] = ()  # inputs that are read again, and their versions

    @property
    def edge(self) -> GradientEdge:
        """Where b arrives in the graph."""
        assert self.output is not None
        return self.output

    def release(self) -> None:
        """Drop the references to the call and its input."""
        self.call, self._held = None, ()

    def refused(self, text: str) -> Reason:
        """A reason that names its parameter."""
        return Reason(self.paths, f": {text}", self.path)

    def input_was_changed(self) -> bool:
        """Whether something wrote into an input after the call."""
        return any(t._version != version for t, version in self._held)

    def output_tangent(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """The output's tangent for tangents of the roots, given by id."""
        return self.tangent_of(self.images(tangents))

    def images(self, tangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The tangents of its arguments by name; of a sharded model each is gathered here."""
        return {n: s.image(tangents[id(s.root)]) for n, s in self.sources.items()}

    def tangent_of(self, images: Mapping[str, Tensor]) -> Tensor:
        """The output's tangent for those of its arguments."""
        return images["value"] if self.call is None else self.call.replay(images)

    def root_gradients(self, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(root, gradient) pairs for the output cotangent b."""
        call = self.call
        by_name = call.weight_gradients(b) if call is not None else {"value": b}
        return [(s.root, s.pullback(by_name[n])) for n, s in self.sources.items()]


def add_gradients(
    total: dict[Tensor, Tensor], pairs: Iterable[tuple[Tensor, Tensor]]
) -> dict[Tensor, Tensor]:
    """Add (root, gradient) pairs to sums by root, in its dtype."""
    for root, g in pairs:
        g = g.to(root.dtype)
        total[root] = total[root] + g if root in total else g
    return total
