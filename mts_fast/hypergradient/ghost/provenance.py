"""Which tensors of a forward hold samples, and which are the same for every batch.

A tensor without a gradient holds samples where it was computed from the batch or from activations.
It decides what is cheap, not what is right: where a use has its samples is checked on the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.weak_table import WeakTable

# functions that repeat entries, as of a class token over the batch
SPREADS = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}
# fmt: off
_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
    "bernoulli", "multinomial", "uniform", "exponential", "log_normal", "cauchy", "geometric",
    "random", "poisson", "binomial", "dropout",
}
# fmt: on


class Origin(Enum):
    """What a tensor without a gradient was made of."""

    SAMPLES = "the batch"
    CONSTANT = "nothing that changes with the batch"
    SPREAD = "a constant repeated for every sample"


class Provenance:
    """Follows tensors without a gradient through one forward of `size` samples.

    Tensors are held weakly: a forward under no_grad (a teacher) keeps no activation alive for it.
    """

    def __init__(self, size: int, samples: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        self.size = size
        self._origins: WeakTable[Origin] = WeakTable()
        self._trained = False  # whether a constant requires a gradient
        for t in constants:
            self._trained = self._trained or t.requires_grad
            self._origins.set(t, Origin.CONSTANT)
        for t in samples:
            self._origins.set(t, Origin.SAMPLES)

    def of(self, t: Tensor) -> Origin | None:
        """The origin of a tensor; None of one that came from elsewhere. An activation, which has a
        graph, holds samples."""
        known = self._origins.get(t)
        if known is not None:
            return known
        return Origin.SAMPLES if t.requires_grad and not t.is_leaf else None

    def may_hold_samples(self, t: Tensor) -> tuple[bool, bool]:
        """Whether it holds samples, and whether that is a guess by its first axis."""
        origin = self.of(t)
        if origin is None:
            guess = t.ndim > 0 and t.shape[0] == self.size
            return guess, guess
        return origin is Origin.SAMPLES, False

    def has_to_note(self, results: Iterable[Tensor], written: Tensor | None) -> bool:
        """Whether a call made, or wrote to, a tensor whose graph does not tell its origin."""
        if self._trained or (written is not None and not written.requires_grad):
            return True
        return not all(t.requires_grad for t in results)

    def note(
        self, name: str, args: Sequence[Tensor], results: Iterable[Tensor], written: Tensor | None
    ) -> None:
        """A call: what its results without a gradient, and what it wrote to, are made of."""
        results = list(results)
        made = [t for t in results if not t.requires_grad]
        with_graph = self._trained and len(made) < len(results)
        if with_graph and all(self.of(t) in (Origin.CONSTANT, Origin.SPREAD) for t in args):
            made = results  # of parameters that nobody tracks
        if written is not None and not written.requires_grad:
            made.append(written)
        if not made or name in _DRAWS:
            return
        origins = [self.of(t) for t in args]
        if Origin.SAMPLES in origins:
            origin = Origin.SAMPLES
        elif None in origins:
            return
        elif Origin.SPREAD in origins:
            origin = Origin.SPREAD
        else:
            origin = Origin.CONSTANT
        for t in made:
            grown = origin is Origin.CONSTANT and name in SPREADS and self.is_spread(t.shape)
            self._origins.set(t, Origin.SPREAD if grown else origin)

    def is_spread(self, shape: torch.Size) -> bool:
        """Whether repeated entries of that shape may be one for every sample."""
        return self.size > 1 and any(n == self.size for n in shape)
