"""Row 6 by layer replay: every layer's input and output gradient are kept, and the layer is run
once more with v in place of its weights. No second derivative, no differences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from mts_fast._isolation import (
    preserved_buffers,
    preserved_rng,
    restored_on_error,
)
from mts_fast._sharding import Sharding
from mts_fast.hypergradient.double_backward import twice_differentiable
from mts_fast.hypergradient.engine import Engine, Linearization, RetainedGraph
from mts_fast.hypergradient.frequency import frequency_reasons
from mts_fast.hypergradient.ghost.capture import Capture, Layout
from mts_fast.hypergradient.ghost.function_call import FunctionCall
from mts_fast.hypergradient.ghost.linearization import (
    GhostLinearization,
    LowMemoryLinearization,
    StoredLinearization,
)
from mts_fast.hypergradient.ghost.reasons import Reason, Unsupported
from mts_fast.hypergradient.ghost.remainder import Remainder, left_over
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.sample_check import (
    Knowledge,
    check_samples,
    has_gradients,
)
from mts_fast.hypergradient.ghost.source import DerivedTensors
from mts_fast.hypergradient.nests import leaves
from mts_fast.hypergradient.objective import LabelledBatch, Objective

# layouts with a history. With more of them (layers left out at random) the oldest is dropped, and
# checked again when it recurs
MOST_LAYOUTS = 256


@dataclass
class _History:
    """The forwards of one layout: their number, and what they showed of every use."""

    knowledge: list[Knowledge]
    forwards: int = 0

    def check_is_due(self) -> bool:
        """At the first forward and whenever their number has doubled."""
        number = self.forwards + 1
        return number & (number - 1) == 0


class Gathered(Mapping[int, Tensor]):
    """Tangents of the roots of a sharded model, by id: each is gathered when it is asked for, so
    that no more than one is whole at a time."""

    def __init__(
        self, sharding: Sharding, roots: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._sharding = sharding
        self._pairs = {id(root): pair for root, pair in zip(roots, pairs, strict=True)}

    def __getitem__(self, root: int) -> Tensor:
        return self._sharding.gathered(*self._pairs[root])

    def __iter__(self) -> Iterator[int]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)


class Ghost(Engine):
    """d_i = sum over all layer calls of <f(a_i; v), b_i>; exact where samples are independent.

    memory "fast" keeps every b from the first backward on, "low" recomputes them when v is known
    and drops each after its use.

    Where the samples lie in every layer's output, and that they are not mixed, is checked on the
    graph of the forward itself, before any part of it is used: at forwards 1, 2, 4, 8, ... of a
    layout, and at every forward with calls that might exchange entries of samples (see `watch`).
    A check costs two or three backward passes. It cannot exclude mixing inside a user's autograd
    function that begins, or changes, between two checks.
    """

    name = "ghost"

    def __init__(
        self, objective: Objective, parameters: Sequence[Tensor], *, memory: str = "fast"
    ) -> None:
        super().__init__(objective, parameters)
        self.memory = memory
        self._names: dict[Tensor, str] = {}
        self._histories: dict[Layout, _History] = {}
        # parameters whose uses are served by the second derivative of the graph, and why
        self.left: dict[Tensor, str] = {}
        self._shared: set[int] = set()  # guesses that turned out wrong, see Capture
        self._checks = 0

    @property
    def roots(self) -> list[Tensor]:
        """The tensors that layers get for the parameters."""
        sharding = self.objective.sharding
        return self.parameters if sharding is None else sharding.whole(self.parameters)

    @property
    def names(self) -> dict[Tensor, str]:
        """Their dotted paths."""
        if not self._names:
            roots, sharding = self.roots, self.objective.sharding
            originals = self.parameters if sharding is None else sharding.originals(self.parameters)
            paths: dict[Tensor, str] = {p: n for n, p in self.objective.model.named_parameters()}
            self._names = {
                root: paths.get(p, f"parameter {i}")
                for i, (root, p) in enumerate(zip(roots, originals, strict=True))
            }
        return self._names

    def tangents(self, direction: Sequence[Tensor]) -> Mapping[int, Tensor]:
        pairs = list(zip(self.parameters, direction, strict=True))
        if self.objective.sharding is None:
            return {id(p): v for p, v in pairs}
        return Gathered(self.objective.sharding, self.roots, pairs)

    def reasons(self) -> list[str]:
        return [
            *coupling(self.objective),
            *_compiled(self.objective),
        ]

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        """As for every engine.

        Raises:
            Unsupported: (a RuntimeError) with every reason that the model and this forward give;
                buffers and generators are as they were.
        """
        if not dots and (gradients == 1 or self.memory == "low"):
            return RetainedGraph(self, batch, gradients)
        left = self.left
        reasons: list[str] = []
        while True:
            try:
                return self._guessed(batch, gradients, left)
            except Unsupported as refused:
                reasons += refused.reasons
                before, left = left, {}
                if not frequency_reasons(self.objective) and self.objective.sharding is None:
                    left = left_over(refused.reasons, self.names, before)
                if not left:
                    raise Unsupported(reasons) from refused.__cause__

    def _guessed(
        self, batch: LabelledBatch, gradients: int, left: dict[Tensor, str]
    ) -> GhostLinearization:
        world = self.objective.world
        try:
            with restored_on_error(world):
                return self._captured(batch, gradients, self._shared, left)
        except _WrongGuess as refused:
            try:
                with restored_on_error(world):
                    return self._captured(batch, gradients, self._shared | refused.turns, left)
            except Unsupported:
                raise Unsupported(refused.reasons) from None

    def _captured(
        self, batch: LabelledBatch, gradients: int, shared: set[int], left: dict[Tensor, str]
    ) -> GhostLinearization:
        cut = self.memory == "fast" and gradients > 0
        capture = self.capture(batch, shared, left, cut=cut)
        with capture, twice_differentiable(self.objective) if left else nullcontext():
            graph = self.objective.losses(batch)
        capture.end(graph)
        reasons = [*self.reasons(), *capture.reasons]
        reasons += [
            use.refused("its layer's input was changed in place after use")
            for use in capture.recorded
            if use.input_was_changed()
        ]
        if self.objective.sharding is not None:
            reasons += needs_values(capture)
        if not graph.requires_grad:
            reasons.append("the losses depend on no parameter, or gradients are switched off")
        self._refuse_together(reasons)
        layout = capture.layout()
        history = self._histories.get(layout)
        if history is None:
            history = _History([Knowledge.before(use) for use in capture.recorded])
        remainder = Remainder(list(left))
        axes = self._axes(graph, capture, history, remainder)
        # nothing below raises, so the history may be updated
        history.forwards += 1
        self._shared, self.left = shared, left
        self._histories[layout] = history
        if len(self._histories) > MOST_LAYOUTS:
            del self._histories[next(iter(self._histories))]
        uses = list(zip(capture.recorded, axes, strict=True))
        derived = DerivedTensors(capture.derived, self.parameters)
        # dots alone need each b once
        if self.memory == "low" or not gradients:
            return LowMemoryLinearization(self, batch, gradients, graph, uses, derived, remainder)
        return StoredLinearization(self, batch, gradients, graph, uses, derived, remainder)

    def capture(
        self,
        batch: LabelledBatch,
        shared: Collection[int] = (),
        left: Collection[Tensor] = (),
        *,
        cut: bool = False,
    ) -> Capture:
        """A watch over a forward of this batch; parameters that are left over are not tracked."""
        without = {id(p) for p in left}
        names = {p: path for p, path in self.names.items() if id(p) not in without}
        samples = [*batch.tensors(), *leaves(batch.labels)]
        buffers = self.objective.world.buffers()
        tracked = {id(p) for p in names}
        others = (p for p in self.objective.world.parameters() if id(p) not in tracked)
        return Capture(names, len(batch), samples, (*buffers, *others), shared, cut=cut)

    def _axes(
        self, graph: Tensor, capture: Capture, history: _History, remainder: Remainder
    ) -> list[SampleAxis | None]:
        """The sample axis of every use; None where the gradient is exactly 0 in this forward.

        Raises:
            Unsupported: samples are mixed, uses were not seen, or cannot be replayed.
            _WrongGuess: a tensor of B entries may be one for all samples.
        """
        uses, size = capture.recorded, len(graph)
        axes = [k.axis(use, size) for use, k in zip(uses, history.knowledge, strict=True)]
        unsettled = [i for i, axis in enumerate(axes) if axis is None]
        due, suspect, is_open = self._on_any(
            history.check_is_due(), capture.may_mix, bool(unsettled)
        )
        if not (due or suspect or is_open):
            return axes
        world = self.objective.world
        # backward passes may run parts of the forward again (checkpointing)
        with preserved_rng(world), preserved_buffers(world):
            self._checks += 1
            if not (due or suspect):
                # every rank that has shards of this model passes over the same part of its graph
                looked_at = uses if self.objective.sharding else [uses[i] for i in unsettled]
                asked = unsettled if self.objective.sharding else range(len(looked_at))
                if not any(self._on_any(has_gradients(graph, looked_at, asked, self._checks))):
                    return axes
            names = capture.roots() if due else None
            try:
                axes, history.knowledge = check_samples(
                    graph,
                    uses,
                    history.knowledge,
                    names,
                    self._checks,
                    lambda flag: self._on_any(flag)[0],
                    self._refuse_together,
                )
                if due:
                    DerivedTensors(capture.derived, self.parameters).check()
                    remainder.check(graph)
            except Unsupported as refused:
                turns = {
                    turn
                    for position, turn in capture.guesses.items()
                    if position < len(uses)
                    and any(uses[position].path in reason for reason in refused.reasons)
                }
                if self._on_any(bool(turns))[0]:
                    raise _WrongGuess(refused.reasons, turns) from refused
                raise
        return axes

    def _on_any(self, *flags: bool) -> list[bool]:
        """Which are set here, or on another rank that has shards of this model: each pass over the
        graph is one that all of them take."""
        sharding = self.objective.sharding
        if sharding is None:
            return list(flags)
        return sharding.any_rank(flags)

    def _refuse_together(self, reasons: Sequence[str]) -> None:
        """Raise where there are reasons, here or on another rank that has shards of this model: all
        of these are between two passes here, and none is left alone in the next.

        Raises:
            Unsupported: with the reasons here.
        """
        if not self._on_any(bool(reasons))[0]:
            return
        if self.objective.sharding is not None:
            self.objective.sharding.reshard()
        raise Unsupported(reasons or ["another rank has reasons against it"])


class _WrongGuess(Unsupported):
    """The guesses numbered `turns` may be wrong: B entries, but not one for each sample."""

    def __init__(self, reasons: Iterable[str], turns: set[int]) -> None:
        super().__init__(reasons)
        self.turns = turns


def coupling(objective: Objective) -> list[str]:
    """Modules that mix the samples of a batch in their present mode."""

    def mixes(module: nn.Module) -> bool:
        return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        )

    return [
        f"{path or 'the model'}: {type(module).__name__} in train mode mixes the samples of a batch"
        " (freeze it with .eval(), or use another engine)"
        for path, module in objective.modules_that(mixes)
    ]


def needs_values(capture: Capture) -> list[Reason]:
    """Uses whose replay reads parameters, which a sharded model has only within a pass."""
    text = "needs the values of parameters again, which a sharded model has let go"
    functions = [
        use.refused(f"its {use.call.rule.function.__name__} {text}")
        for use in capture.recorded
        if isinstance(use.call, FunctionCall)
    ]
    return functions + [Reason(d.paths, f": a tensor made of it {text}") for d in capture.derived]


def _compiled(objective: Objective) -> list[str]:
    return [
        f"{path}: compiled by torch.compile, which hides the calls of its layers"
        " (pass the module as it was)"
        for path in objective.compiled_modules()
    ]
