"""A captured forward, read in two orders: everything kept at once, or each b used as it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.ghost.call_dots import call_dots
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
        dots = call_dots(use, axis, b, tangents, len(self._losses))
        return dots.to(self._losses.dtype)

    def times_used(self) -> Counter[Tensor]:
        """How many recorded uses each parameter has."""
        return Counter(s.parameter for use, _ in self._uses for s in use.sources.values())

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


@dataclass
class Kept:
    """What the backward left of one use: p b and its layer, or every sample's own gradients.

    The latter [B, *argument] by name, times p; then neither input nor output gradient is held.
    """

    use: Recorded
    axis: SampleAxis
    b: Tensor | None = None
    own: dict[str, Tensor] | None = None

    def scaled_gradients(self, ratio: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(parameter, gradient) pairs with each sample's part times its ratio [B]."""
        if self.own is not None:
            sums = {n: torch.tensordot(ratio.to(g.dtype), g, 1) for n, g in self.own.items()}
            return [(s.parameter, s.pullback(sums[n])) for n, s in self.use.sources.items()]
        if self.b is None:
            return []
        return self.use.parameter_gradients(self.b * self.axis.expand(ratio, self.b))


class FastLinearization(GhostLinearization):
    """One backward with the cotangent p gives the gradient and, on the way, p_i b_i at each call.

    The graph is gone then. p_i d_i = <replay, p b>_i, and the gradient for other weights p' is that
    of p b times p'/p: one GEMM per layer, no second backward.
    """

    _p: Tensor | None = None  # the cotangent of the backward
    _kept: list[Kept]

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        p = p.to(self._losses.dtype)
        if self._p is None:
            return self._backward(p)
        ratio = self._over_p(p)
        total: dict[Tensor, Tensor] = {}
        for kept in self._consumed():
            for parameter, g in kept.scaled_gradients(ratio):
                g = g.to(parameter.dtype)
                total[parameter] = total[parameter] + g if parameter in total else g
        return [total.get(p) for p in self.engine.parameters]

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        if self._p is None:
            self._backward(torch.ones_like(self._losses))
        tangents = self._tangents(direction)
        total = torch.zeros_like(self._losses)  # [B], p_i d_i
        with torch.no_grad():
            for kept in self._consumed():
                if kept.own is not None:
                    for name, g in kept.own.items():
                        source = kept.use.sources[name]
                        v = source.image(tangents[id(source.parameter)])
                        total += (g.flatten(1) @ v.flatten().to(g.dtype)).to(total.dtype)
                elif kept.b is not None:
                    total += self._dots(kept.use, kept.axis, kept.b, tangents)
        return self._over_p(total)

    def _backward(self, p: Tensor) -> list[Tensor | None]:
        p = torch.maximum(p, p.max() * SMALLEST_SHARE)
        parameters = self.engine.parameters
        graph, self._graph = self._graph, None
        assert graph is not None
        kept = [Kept(use, axis) for use, axis in self._uses]
        few = [k for k in kept if self._has_few_parameters(k.use)]
        rest = [k for k in kept if not self._has_few_parameters(k.use)]
        with ExitStack() as hooks:
            for k in few:
                hooks.callback(k.use.edge.node.register_prehook(self._keeper(k)).remove)
            edges: list = [k.use.edge for k in rest]
            found = torch.autograd.grad(graph, [*parameters, *edges], p, allow_unused=True)
        for k, b in zip(rest, found[len(parameters) :], strict=True):
            k.b = b
        self._p, self._kept, self._uses = p, kept, []
        for k in kept:
            k.use.output = None  # an edge holds the graph
        copies = [(k.use, k.b) for k in rest if k.use.call is None]
        return self._with_copies(found[: len(parameters)], copies)

    def _has_few_parameters(self, use: Recorded) -> bool:
        return use.call is not None and use.call.rule.sample_gradients is not None

    def _keeper(self, kept: Kept) -> Callable[[tuple[Tensor, ...]], None]:
        """Turns b into every sample's own gradients as the backward passes, and lets go of a."""

        def keep(b: tuple[Tensor, ...]) -> None:
            call = kept.use.call
            assert call is not None and call.rule.sample_gradients is not None
            own = b[kept.use.edge.output_nr]
            kept.own = call.rule.sample_gradients(call, own, kept.axis, len(self._losses))
            kept.use.release()

        return keep

    def _over_p(self, values: Tensor) -> Tensor:
        """values / p; where all weights are 0, nothing is known of b, and nothing asked."""
        assert self._p is not None
        return torch.where(self._p > 0, values / self._p, torch.zeros_like(values))

    def _consumed(self) -> Iterator[Kept]:
        """What was kept; dropped one by one unless a gradient is still to come."""
        if self._gradients_left:
            yield from self._kept
            return
        while self._kept:
            yield self._kept.pop()


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
        self.visit(lambda use, axis, b: total.add_(self._dots(use, axis, b, tangents)))
        return total

    def visit(self, consume: Callable[[Recorded, SampleAxis, Tensor], object]) -> None:
        """Hand over every use with the output gradient b of sum_i l_i, as it comes."""
        # the backward has to reach the uses with nothing recorded before them
        first = {i for i, (use, _) in enumerate(self._uses) if use.is_first()}
        unmet = set(range(len(self._uses))) - first
        self._dots_are_due = not self._reaches_all()

        def meet(i: int, b: Tensor | None) -> None:
            unmet.discard(i)
            if b is not None:
                with torch.no_grad():
                    consume(*self._uses[i], b)

        with ExitStack() as hooks:
            for i in unmet:
                edge = self._uses[i][0].edge
                handle = edge.node.register_prehook(lambda b, i=i, k=edge.output_nr: meet(i, b[k]))
                hooks.callback(handle.remove)
            self._meet_captured(first, meet)
        self._dots_are_due = False
        # what depends on gradients of its input that nobody recorded
        self._meet_captured(set(unmet), meet)
        if not self._gradients_left:
            self._graph, self._uses = None, []

    def _reaches_all(self) -> bool:
        """Whether all gradients of layer inputs come from recorded uses."""
        mine = {id(p) for p in self.engine.parameters}
        others = self.engine.objective.model.parameters()
        return not any(
            t.requires_grad for t in [*others, *self.batch.tensors()] if id(t) not in mine
        )

    def _meet_captured(self, which: set[int], meet: Callable[[int, Tensor | None], None]) -> None:
        edges = [self._uses[i][0].edge for i in which]
        if edges:
            found = self._backward(edges, torch.ones_like(self._losses))
            for i, b in zip(which, found, strict=True):
                meet(i, b)

    def _backward(self, leaves: list, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        keep = self._dots_are_due or self._gradients_left > 0
        graph = self._graph
        assert graph is not None
        if not keep:
            self._graph = None
        return torch.autograd.grad(graph, leaves, cotangent, retain_graph=keep, allow_unused=True)
