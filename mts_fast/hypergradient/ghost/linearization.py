"""Gradients and dots of a captured forward, in two ways: every output gradient b is stored, or
recomputed and used at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.hypergradient.engine import Engine, Linearization, dense
from mts_fast.hypergradient.ghost.call_dots import call_dots
from mts_fast.hypergradient.ghost.passes import in_callers_context, visit_output_gradients
from mts_fast.hypergradient.ghost.recorded import RecordedCall, add_gradients
from mts_fast.hypergradient.ghost.remainder import Remainder
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis, Spread
from mts_fast.hypergradient.ghost.sample_check import failure_named
from mts_fast.hypergradient.ghost.source import DerivedTensors, ParameterSource
from mts_fast.hypergradient.objective import LabelledBatch

# weights below this share of the largest are raised to it in backward passes: b of their samples
# keeps full precision, and their part of a gradient is still far below rounding
SMALLEST_SHARE = 2.0**-60


class GhostLinearization(Linearization):
    """Losses, graph and recorded calls of one forward.

    A use whose axis is None has no gradient in this forward and adds nothing to the dots.
    """

    def __init__(
        self,
        engine: Engine,
        batch: LabelledBatch,
        gradients: int,
        graph: Tensor,
        uses: list[tuple[RecordedCall, SampleAxis | None]],
        derived: DerivedTensors,
        remainder: Remainder,
    ) -> None:
        super().__init__(engine, batch, gradients)
        self.derived = derived
        self.remainder = remainder
        self._graph: Tensor | None = graph
        self._losses = graph.detach()
        self._uses = uses

    @property
    def losses(self) -> Tensor:
        return self._losses

    def _dots(
        self, use: RecordedCall, axis: SampleAxis, b: Tensor, tangents: Mapping[int, Tensor]
    ) -> Tensor:
        """This call's part of d [B], times the cotangent with which b was computed."""
        with failure_named(use):
            dots = call_dots(use, axis, b, tangents, len(self._losses))
        return dots.to(self._losses.dtype)

    def times_used(self) -> Counter[Tensor]:
        """How many recorded uses each root has."""
        return Counter(s.root for use, _ in self._uses for s in use.sources.values())

    def _tangents(self, direction: Sequence[Tensor]) -> Mapping[int, Tensor]:
        """Tangents of all roots, by id."""
        tangents = self.engine.tangents(direction)
        if not self.derived.leaves:
            return tangents
        return {**tangents, **self.derived.tangents(direction)}

    def _roots(self) -> list[Tensor]:
        return [*self.engine.parameters, *self.derived.summed]

    def _with_others(
        self, autograds: Sequence[Tensor | None], others: dict[Tensor, Tensor]
    ) -> list[Tensor | None]:
        """Autograd's gradients by the roots, and those that it left out, by parameter.

        All are dense, as gradients computed from b are.
        """
        for root, g in zip(self._roots(), dense(autograds), strict=True):
            if g is not None:
                others[root] = others[root] + g if root in others else g
        total = self.derived.add_pulled_back(others)
        return [total.get(p) for p in self.engine.parameters]


@dataclass
class Record:
    """One use after the backward: p b and its layer call; or, where the layer's parameters are few,
    the gradients of every sample [B, *argument] by name, times p."""

    use: RecordedCall
    axis: SampleAxis | None
    b: Tensor | None = None
    sample_gradients: dict[str, Tensor] | None = None

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """(root, gradient) pairs for p."""
        if self.b is not None:
            return self.use.root_gradients(self.b)
        rows, sources = self.sample_gradients or {}, self.use.sources
        return [(sources[n].root, sources[n].pullback(g.sum(0))) for n, g in rows.items()]

    def scaled_gradients(self, ratio: Spread) -> list[tuple[Tensor, Tensor]]:
        """(root, gradient) pairs with each sample's part times its ratio [B]."""
        if self.b is None:
            return []
        b = self.b if self.axis is None else self.b * ratio.over(self.axis, self.b)
        return self.use.root_gradients(b)


class SampleGradients:
    """Per-sample gradients of many parameters side by side, [B, n] for each dtype."""

    def __init__(self, records: Sequence[Record]) -> None:
        columns: dict[torch.dtype, list[tuple[ParameterSource, Tensor]]] = defaultdict(list)
        for record in records:
            for name, g in (record.sample_gradients or {}).items():
                columns[g.dtype].append((record.use.sources[name], g))
            record.sample_gradients = None
        self._sources = [[(s, g.shape[1:]) for s, g in c] for c in columns.values()]
        self._rows = [torch.cat([g.reshape(len(g), -1) for _, g in c], 1) for c in columns.values()]

    def dots(self, tangents: Mapping[int, Tensor]) -> list[Tensor]:
        """Parts of p d, each [B]."""
        parts = []
        for sources, rows in zip(self._sources, self._rows, strict=True):
            images = [s.image(tangents[id(s.root)]).flatten() for s, _ in sources]
            parts.append(rows @ torch.cat(images).to(rows.dtype))
        return parts

    def scaled_gradients(self, ratio: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(root, gradient) pairs with each sample's part times its ratio [B]."""
        for sources, rows in zip(self._sources, self._rows, strict=True):
            sums = (ratio.to(rows.dtype) @ rows).split([shape.numel() for _, shape in sources])
            for (source, shape), total in zip(sources, sums, strict=True):
                yield source.root, source.pullback(total.view(shape))


class StoredLinearization(GhostLinearization):
    """One backward with the cotangent p gives the gradient and, on the way, p_i b_i at each call.

    It frees the graph. p_i d_i = <replay, p b>_i, and the gradient for other weights p' is that
    of p b times p'/p: one GEMM per layer, no second backward.
    """

    _p: Tensor | None = None  # the cotangent of the backward
    _records: list[Record]
    _few: SampleGradients  # of layers with few parameters

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        p = p.to(self._losses.dtype)
        if self._p is None:
            return self._backward(p)
        ratio = self._over_p(p)
        left: dict[Tensor, Tensor] = {}
        if self.remainder:
            assert self._graph is not None
            left = self.remainder.gradient(self._graph, p, retain=self._gradients_left > 0)
        total = add_gradients({}, self._few.scaled_gradients(ratio))
        spread = Spread(ratio)
        for record in self._consumed():
            add_gradients(total, record.scaled_gradients(spread))
        total = add_gradients(self.derived.add_pulled_back(total), left.items())
        return [total.get(p) for p in self.engine.parameters]

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        if self._p is None:
            self._backward(torch.ones_like(self._losses))
        tangents = self._tangents(direction)
        with torch.no_grad():
            # of p d, [B] each
            parts = [part.to(self._losses.dtype) for part in self._few.dots(tangents)]
            for record in self._consumed():
                if record.b is not None and record.axis is not None:
                    parts.append(self._dots(record.use, record.axis, record.b, tangents))
            parts = parts or [torch.zeros_like(self._losses)]
            dots = self._over_p(torch.stack(parts).sum(0))
        left = self.remainder.dots(tangents)
        return dots if left is None else dots + left

    def _backward(self, p: Tensor) -> list[Tensor | None]:
        p = torch.maximum(p, p.max() * SMALLEST_SHARE)
        roots = self._roots()
        graph = self._graph
        assert graph is not None
        keep = bool(self.remainder) and self._gradients_left > 0
        if not keep:
            self._graph = None
        self.remainder.prepare(graph, p)
        records = [Record(use, axis) for use, axis in self._uses]
        few = [r for r in records if self._keeps_sample_gradients(r)]
        rest = [r for r in records if not self._keeps_sample_gradients(r)]
        with ExitStack() as hooks:
            for r in few:
                hooks.callback(r.use.edge.node.register_prehook(self._keeper(r)).remove)
            edges: list = [r.use.edge for r in rest]
            gradients = torch.autograd.grad(
                graph, [*roots, *edges], p, retain_graph=keep, allow_unused=True
            )
        for r, b in zip(rest, gradients[len(roots) :], strict=True):
            r.b = b
        for r in records:
            r.use.output = None  # an edge keeps the graph in memory
        self._p, self._records, self._uses = p, rest, []
        others: dict[Tensor, Tensor] = {}
        for r in records:
            if not r.use.in_sum:
                add_gradients(others, r.gradients())
        self._few = SampleGradients(few)
        return self._with_others(gradients[: len(roots)], others)

    def _keeps_sample_gradients(self, record: Record) -> bool:
        call, axis = record.use.call, record.axis
        if call is None or axis is None or call.rule.sample_gradients is None:
            return False
        few = call.rule.few
        return few is None or few(call, axis, len(record.use.shape))

    def _keeper(self, record: Record) -> Callable[[tuple[Tensor | None, ...]], None]:
        """A hook that turns b into per-sample gradients during the backward, and releases a."""

        def store(_: int, b: Tensor) -> None:
            call, axis = record.use.call, record.axis
            assert call is not None and call.rule.sample_gradients is not None
            assert axis is not None
            with failure_named(record.use):
                record.sample_gradients = call.rule.sample_gradients(
                    call, b, axis, len(self._losses)
                )
            record.use.release()

        store_here = in_callers_context(store, self._losses.device)

        def keep(b: tuple[Tensor | None, ...]) -> None:
            gradient = b[record.use.edge.output_nr]
            if gradient is not None:
                store_here(0, gradient)

        return keep

    def _over_p(self, values: Tensor) -> Tensor:
        """values / p. p is 0 only where all weights are 0; the result is then 0."""
        assert self._p is not None
        return (values / self._p).masked_fill(self._p <= 0, 0.0)

    def _consumed(self) -> Iterator[Record]:
        """The records, each dropped after its use unless a gradient is still to come."""
        if self._gradients_left:
            yield from self._records
            return
        while self._records:
            yield self._records.pop()


class LowMemoryLinearization(GhostLinearization):
    """Keeps the graph; once v is known, a backward pass recomputes each b, uses it and drops it."""

    _dots_are_due = True

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        copies = [use for use, _ in self._uses if not use.in_sum]
        roots = self._roots()
        leaves: list = [*roots, *(use.edge for use in copies)]
        graph, retain = self._graph, self._dots_are_due or self._gradients_left > 0
        assert graph is not None
        gradients = torch.autograd.grad(
            graph,
            leaves,
            p.to(self._losses.dtype),
            retain_graph=retain,
            allow_unused=True,
        )
        if not retain:
            self._graph, self._uses = None, []
        others: dict[Tensor, Tensor] = {}
        for use, b in zip(copies, gradients[len(roots) :], strict=True):
            if b is not None:
                add_gradients(others, use.root_gradients(b))
        return self._with_others(gradients[: len(roots)], others)

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        tangents = self._tangents(direction)
        total = torch.zeros_like(self._losses)  # [B]
        if self.remainder:
            assert self._graph is not None
            self.remainder.prepare(self._graph, torch.ones_like(self._losses))
            left = self.remainder.dots(tangents)
            assert left is not None
            total += left
        self.visit(lambda use, axis, b: total.add_(self._dots(use, axis, b, tangents)), tangents)
        if self.engine.objective.sharding is not None:
            self.engine.objective.sharding.in_pass = False
        return total

    def visit(
        self,
        consume: Callable[[RecordedCall, SampleAxis, Tensor], object],
        tangents: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Call `consume` with every use and its output gradient b of sum_i l_i, one at a time; of
        the roots it reads `tangents`."""
        sharding = self.engine.objective.sharding
        graph, pairs = self._graph, self._uses
        assert graph is not None
        if not self._gradients_left:
            self._graph, self._uses = None, []

        def consume_at(i: int, b: Tensor) -> None:
            use, axis = pairs[i]
            if axis is not None:
                consume(use, axis, b)
            elif sharding is not None and tangents is not None:
                use.images(tangents)  # the other ranks gather them for theirs

        self._dots_are_due = False
        uses, ones = [use for use, _ in pairs], torch.ones_like(self._losses)
        visit_output_gradients(graph, uses, ones, consume_at, retain=self._gradients_left > 0)
