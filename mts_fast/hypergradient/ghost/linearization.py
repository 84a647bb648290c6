"""A captured forward, read in two orders: everything kept at once, or each b used as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.ghost.capture import Recorded
from mts_fast.hypergradient.ghost.probe import sum_gradients
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.objective import LabelledBatch

# weights below this share of the largest are taken as this share in backward passes: b of such a
# sample stays known to full precision, and its part of a gradient far below rounding.
SMALLEST_SHARE = 2.0**-60


class GhostLinearization(Linearization):
    """Losses, graph and recorded calls of one forward."""

    def __init__(
        self,
        engine: Engine,
        batch: LabelledBatch,
        gradients: int,
        graph: Tensor,
        uses: list[tuple[Recorded, SampleAxis]],
    ) -> None:
        super().__init__(engine, batch, gradients)
        self._graph: Tensor | None = graph
        self._losses = graph.detach()
        self._uses = uses

    @property
    def losses(self) -> Tensor:
        return self._losses

    def _dots(self, use: Recorded, axis: SampleAxis, b: Tensor, tangents: dict) -> Tensor:
        """This call's part of b's cotangent times d [B]."""
        tangent = use.output_tangent(tangents)
        replayed = use.call is not None  # else it is v itself
        dots = axis.dot(tangent, b, len(self._losses), overwrite=replayed)
        return dots.to(self._losses.dtype)

    def _tangents(self, direction: Sequence[Tensor]) -> dict[int, Tensor]:
        return {id(p): v for p, v in zip(self.engine.parameters, direction, strict=True)}

    def _with_copies(
        self, found: Sequence[Tensor | None], copies: Sequence[tuple[Recorded, Tensor | None]]
    ) -> list[Tensor | None]:
        """Autograd's gradients, and those of parameters that entered the graph as copies."""
        gradients = list(found)
        extra = sum_gradients([use for use, _ in copies], [b for _, b in copies])
        for i, parameter in enumerate(self.engine.parameters):
            g, more = gradients[i], extra.get(parameter)
            gradients[i] = more if g is None else g if more is None else g + more
        return gradients


class FastLinearization(GhostLinearization):
    """One backward with the cotangent p gives the gradient and, on the way, p_i b_i at each call.

    The graph is gone then. p_i d_i = <replay, p b>_i, and the gradient for other weights p' is that
    of p b times p'/p: one GEMM per layer, no second backward.
    """

    _p: Tensor | None = None  # the cotangent of the backward
    _b: list[Tensor | None]  # p b of each call

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        p = p.to(self._losses.dtype)
        if self._p is None:
            return self._backward(p)
        ratio = self._over_p(p)
        total: dict[Tensor, Tensor] = {}
        for use, axis, b in self._consumed(keep=self._gradients_left > 0):
            for parameter, g in use.parameter_gradients(b * axis.expand(ratio, b)):
                g = g.to(parameter.dtype)
                total[parameter] = total[parameter] + g if parameter in total else g
        return [total.get(p) for p in self.engine.parameters]

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        if self._p is None:
            self._backward(torch.ones_like(self._losses), weights=False)
        tangents = self._tangents(direction)
        total = torch.zeros_like(self._losses)  # [B], p_i d_i
        with torch.no_grad():
            for use, axis, b in self._consumed(keep=self._gradients_left > 0):
                total += self._dots(use, axis, b, tangents)
        return self._over_p(total)

    def _backward(self, p: Tensor, *, weights: bool = True) -> list[Tensor | None]:
        p = torch.maximum(p, p.max() * SMALLEST_SHARE)
        parameters = self.engine.parameters if weights else []
        edges: list = [use.edge for use, _ in self._uses]
        graph, self._graph = self._graph, None
        assert graph is not None
        found = torch.autograd.grad(graph, [*parameters, *edges], p, allow_unused=True)
        self._p, self._b = p, list(found[len(parameters) :])
        for use, _ in self._uses:
            use.output = None  # an edge holds the graph
        if not weights:
            return []
        pairs = [
            (use, b) for (use, _), b in zip(self._uses, self._b, strict=True) if use.call is None
        ]
        return self._with_copies(found[: len(parameters)], pairs)

    def _over_p(self, values: Tensor) -> Tensor:
        """values / p; where all weights are 0, nothing is known of b, and nothing asked."""
        assert self._p is not None
        return torch.where(self._p > 0, values / self._p, torch.zeros_like(values))

    def _consumed(self, *, keep: bool) -> Iterator[tuple[Recorded, SampleAxis, Tensor]]:
        """Each call with its b; they are dropped one by one unless they are wanted again."""
        uses, cotangents = (self._uses, self._b) if keep else (self._uses[::-1], self._b[::-1])
        if not keep:
            self._uses, self._b = [], []
        for i in range(len(uses)):
            use, axis = uses[i] if keep else uses.pop()
            b = cotangents[i] if keep else cotangents.pop()
            if b is not None:
                yield use, axis, b


class LeanLinearization(GhostLinearization):
    """The graph is kept; once v is known a pass of input gradients meets each b, and drops it."""

    _dots_are_due = True

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        copies = [use for use, _ in self._uses if use.call is None]
        parameters = self.engine.parameters
        edges = [use.edge for use in copies]
        found = self._backward([*parameters, *edges], p.to(self._losses.dtype))
        pairs = list(zip(copies, found[len(parameters) :], strict=True))
        return self._with_copies(found[: len(parameters)], pairs)

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        tangents = self._tangents(direction)
        total = torch.zeros_like(self._losses)  # [B]
        # the backward has to reach the uses with nothing recorded before them
        first = {i for i, (use, _) in enumerate(self._uses) if use.is_first()}
        unmet = set(range(len(self._uses))) - first

        def consume(i: int, b: Tensor | None) -> None:
            unmet.discard(i)
            if b is not None:
                with torch.no_grad():
                    total.add_(self._dots(*self._uses[i], b, tangents))

        with ExitStack() as hooks:
            for i in unmet:
                edge = self._uses[i][0].edge
                handle = edge.node.register_prehook(
                    lambda b, i=i, k=edge.output_nr: consume(i, b[k])
                )
                hooks.callback(handle.remove)
            self._consume_captured(first, consume)
        # what depends on parameters that the optimizer does not hold
        self._consume_captured(set(unmet), consume)
        self._dots_are_due = False
        if not self._gradients_left:
            self._graph, self._uses = None, []
        return total

    def _consume_captured(
        self, which: set[int], consume: Callable[[int, Tensor | None], None]
    ) -> None:
        edges = [self._uses[i][0].edge for i in which]
        if edges:
            found = self._backward(edges, torch.ones_like(self._losses))
            for i, b in zip(which, found, strict=True):
                consume(i, b)

    def _backward(self, leaves: list, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        keep = self._dots_are_due or self._gradients_left > 0
        graph = self._graph
        assert graph is not None
        if not keep:
            self._graph = None
        return torch.autograd.grad(graph, leaves, cotangent, retain_graph=keep, allow_unused=True)
