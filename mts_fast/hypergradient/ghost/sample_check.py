"""What the graph of a forward shows: where samples lie, whether they mix, uses not seen.

Every sample's loss gets a factor of its own. Where samples are independent, each output gradient b
is that of equal factors, times the factor of the sample that an entry belongs to: this finds the
entries of every sample, and no layout fits where samples are mixed. The sum over the samples, by
which engines are compared, is right along every axis and shows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.passes import (
    visit_output_gradients,
    visit_with_gradients,
)
from mts_fast.hypergradient.ghost.reasons import Reason, Unsupported
from mts_fast.hypergradient.ghost.recorded import RecordedCall, add_gradients
from mts_fast.hypergradient.ghost.sample_axis import (
    SampleAxis,
    SampleRows,
    agrees,
    distinct,
    factor_rounds,
    layouts,
    rounding_share,
    sketch,
)

# the seeds of two uses' sketches differ by multiples of a prime
SEED_STRIDE = 7919


@dataclass(frozen=True)
class Knowledge:
    """The layouts of one use that no forward has ruled out; `seen` if it ever had a gradient."""

    candidates: tuple[SampleAxis, ...]
    seen: bool = False
    routed: bool = False  # its rows are where they were followed to

    @classmethod
    def before(cls, use: RecordedCall) -> Knowledge:
        """Every layout is possible."""
        return cls(layouts(use.shape))

    def axis(self, use: RecordedCall, size: int) -> SampleAxis | None:
        """The one layout that is left for a batch of that size, or None while it is open."""
        if use.rows is not None:
            return SampleRows(use.rows) if self.routed else None
        left = distinct(self.candidates, use.shape, size)
        return left[0] if self.seen and len(left) == 1 else None


@dataclass
class _Look:
    """One use in the passes of a check."""

    use: RecordedCall
    options: list[SampleAxis]
    seed: int
    plain: list[Tensor] = field(default_factory=list)  # sketches by option
    agreement: list[Tensor] = field(default_factory=list)  # bool by option
    nonzero: list[Tensor] = field(default_factory=list)  # bool by pass
    finite: list[Tensor] = field(default_factory=list)  # bool by pass

    def sketches(self, b: Tensor, size: int) -> list[Tensor]:
        self.nonzero.append(b.any())
        self.finite.append(torch.isfinite(b.sum()))
        if not b.numel():
            return []
        return [sketch(b, option, size, self.seed) for option in self.options]


def has_gradients(
    graph: Tensor, uses: Sequence[RecordedCall], asked: Collection[int], seed: int
) -> bool:
    """Whether any of the uses with the numbers `asked` has an output gradient in this forward."""
    factors = next(factor_rounds(len(graph), graph, seed))
    seen: list[Tensor] = []

    def look(i: int, b: Tensor) -> None:
        if i in asked:
            seen.append(b.any())

    with failures_named():
        visit_output_gradients(graph, uses, factors, look, retain=True)
    return bool(seen) and bool(torch.stack(seen).any())


def check_samples(
    graph: Tensor,
    uses: Sequence[RecordedCall],
    knowledge: Sequence[Knowledge],
    names: Mapping[Tensor, frozenset[str]] | None,
    seed: int,
    any_rank: Callable[[bool], bool],
    refuse: Callable[[Sequence[str]], None],
) -> tuple[list[SampleAxis | None], list[Knowledge]]:
    """Where the samples of every use lie in this forward; None where its gradient is exactly 0.

    With `names` of the roots also whether the recorded uses make up autograd's gradients, and
    whether every use can be replayed. The graph is kept. Ranks that pass over their graphs together
    (a sharded model) make as many passes each: `any_rank` tells whether one of them needs another.
    `refuse` raises where there are reasons.

    Raises:
        Unsupported: samples are mixed, uses were not seen, or cannot be replayed.
    """
    size = len(graph)
    looks = []
    for i, (use, known) in enumerate(zip(uses, knowledge, strict=True)):
        options = distinct(known.candidates, use.shape, size)
        if not options:  # no candidate that is left fits this size
            options = distinct(Knowledge.before(use).candidates, use.shape, size)
        if use.rows is not None:
            options = [SampleRows(use.rows), *options]
        looks.append(_Look(use, options, seed + SEED_STRIDE * i))
    sums = _Sums(uses)

    def plain(i: int, b: Tensor) -> None:
        looks[i].plain = looks[i].sketches(b, size)
        if names is not None:
            sums.add(i, b)

    ones = torch.ones_like(graph)
    with failures_named():
        if names is None:
            visit_output_gradients(graph, uses, ones, plain, retain=True)
        else:
            truth = visit_with_gradients(graph, uses, list(names), ones, plain)
    rounds = factor_rounds(size, graph, seed)
    factors = next(rounds)
    while True:

        def scaled(i: int, b: Tensor, factors: Tensor = factors) -> None:
            look = looks[i]
            pairs = zip(look.plain, look.sketches(b, size), strict=True)
            look.agreement = [agrees(old, new, factors, b.dtype) for old, new in pairs]

        with failures_named():
            visit_output_gradients(graph, uses, factors, scaled, retain=True)
        for look in looks:
            if look.agreement:
                fits = torch.stack(look.agreement).tolist()
                look.options = [o for o, fit in zip(look.options, fits, strict=True) if fit]
                look.plain = [p for p, fit in zip(look.plain, fits, strict=True) if fit]
        more = next(rounds, None)
        is_open = any(len(look.options) > 1 and look.agreement for look in looks)
        if not any_rank(is_open and more is not None):
            break
        factors = factors if more is None else more
    axes, learned = [], []
    reasons: list[str] = []
    for look, known in zip(looks, knowledge, strict=True):
        nonzero = bool(look.nonzero) and bool(torch.stack(look.nonzero).any())
        if nonzero and not look.options:
            reasons.append(
                look.use.refused("samples are mixed in, or after, the layer that uses it")
            )
        axes.append(look.options[0] if nonzero and look.options else None)
        learned.append(_learned(look, known, size) if nonzero else known)
    if names is not None and not reasons:
        reasons = sums.missed(dict(zip(names, truth, strict=True)), names)
    refuse(reasons)
    return axes, learned


def _learned(look: _Look, known: Knowledge, size: int) -> Knowledge:
    """The candidates that are left after a check; NaN and infinity rule nothing out."""
    if not bool(torch.stack(look.finite).all()):
        return known
    if look.options and isinstance(look.options[0], SampleRows):
        return Knowledge(known.candidates, seen=known.seen, routed=True)
    shape = look.use.shape
    candidates = known.candidates
    if not distinct(candidates, shape, size):
        candidates = Knowledge.before(look.use).candidates
    left = tuple(
        c for c in candidates if c.fits(shape, size) and c.simplest(shape, size) in look.options
    )
    return Knowledge(left, seen=True)


class _Sums:
    """The parameters' gradients from recorded output gradients, beside autograd's."""

    def __init__(self, uses: Sequence[RecordedCall]) -> None:
        self._uses = uses
        self._gradients: dict[Tensor, Tensor] = {}
        self._terms: dict[Tensor, Tensor] = {}  # the sums with |b|: their size without cancellation
        self._allowed = 0.0

    def add(self, i: int, b: Tensor) -> None:
        """One use's part, where autograd's gradient has it."""
        use = self._uses[i]
        with failure_named(use):
            _try_replay(use, b)
            if use.in_sum:
                add_gradients(self._gradients, use.root_gradients(b))
                add_gradients(self._terms, use.root_gradients(b.abs()))
                self._allowed = max(self._allowed, rounding_share(b.dtype))

    def missed(
        self, truth: dict[Tensor, Tensor | None], names: Mapping[Tensor, frozenset[str]]
    ) -> list[str]:
        """Roots whose recorded uses do not make up autograd's gradient."""
        reasons: list[str] = []
        for parameter, paths in names.items():
            path = ", ".join(sorted(paths))
            true, ours = truth[parameter], self._gradients.get(parameter)
            if (true is None) != (ours is None):
                reasons.append(Reason(paths, " is used in a way that was not seen", path))
            elif true is not None and ours is not None:
                true = true.to_dense() if true.layout is not torch.strided else true
                size = torch.maximum(true.norm(), self._terms[parameter].norm())
                if (true - ours).norm() > self._allowed * size:
                    text = ": the calls that were seen do not make up its gradient"
                    reasons.append(Reason(paths, text, path))
        return reasons


def _try_replay(use: RecordedCall, b: Tensor) -> None:
    """Replay a use with tangents of 0, to see that it can be, and that it leaves them as they are.

    Raises:
        Unsupported: it writes to its parameters, or gives another shape.
    """
    tangents = {id(s.root): torch.zeros_like(s.root) for s in use.sources.values()}
    versions = [t._version for t in tangents.values()]
    y = use.output_tangent(tangents)
    if [t._version for t in tangents.values()] != versions:
        raise Unsupported([use.refused("its layer writes to it (see replay_options)")])
    if torch.broadcast_shapes(y.shape, b.shape) != b.shape:
        raise Unsupported([use.refused("its replay has another shape than its output")])


@contextmanager
def failure_named(use: RecordedCall) -> Iterator[None]:
    """Errors inside become reasons that name the parameter; out of memory is raised as it is."""
    try:
        yield
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"its layer cannot be replayed ({_line(error)})"
        raise Unsupported([use.refused(why)]) from error


@contextmanager
def failures_named() -> Iterator[None]:
    """Errors of a backward become a reason."""
    try:
        yield
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"the losses cannot be differentiated ({_line(error)})"
        raise Unsupported([reason]) from error


def _line(error: Exception) -> str:
    """Type and first sentence of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
