"""What a step computes of its batch: all of it, or a draw that stands for all of it.

`Part` is what the rows of the algorithm ask: which samples to run, with which weights, and what
turns the results for these into results for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mts_fast.diagnostics import SamplingStatistics
from mts_fast.distributed import Ranks, Shard
from mts_fast.hypergradient import LabelledBatch
from mts_fast.sampling import (
    Draw,
    Regression,
    inclusion_probabilities,
    regression_estimator,
    size_measure,
    systematic_sample,
    variance_ratio,
)
from mts_fast.training.batch import CheckedBatch, SelectorRows
from mts_fast.training.sampled.batch_statistics import ComputedBatch
from mts_fast.training.sampled.candidates import Candidates, Head
from mts_fast.training.sampled.placing import place, seeded


class Part(Protocol):
    """The samples that are run, and what they stand for."""

    @property
    def batch(self) -> LabelledBatch:
        """The samples that are run here."""

    @property
    def shard(self) -> Shard:
        """Which ones of those that all ranks run."""

    @property
    def completed(self) -> Sequence[int]:
        """The parameters, by number, whose gradient is known of all samples."""

    def weights(self, p: Tensor) -> Tensor:
        """The weights of the samples that all ranks run, for weights p of the batch."""

    def rest(self, p: Tensor) -> list[Tensor | None]:
        """What the gradients of the `completed` lack of sum p l over the batch here, from that of
        the weighted samples."""

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """What takes the place of d in row 7, for the batch of all ranks."""


def whole_gradient(
    gradient: Sequence[Tensor | None], part: Part, rest: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradient of the batch, from that of the samples that were run."""
    whole = list(gradient)
    for i, more in zip(part.completed, rest, strict=True):
        old = whole[i]
        if more is not None:
            whole[i] = more if old is None else old + more.to(old.dtype)
    return whole


@dataclass(frozen=True)
class Whole:
    """Every sample is computed."""

    batch: CheckedBatch
    completed: tuple[int, ...] = ()

    @property
    def shard(self) -> Shard:
        """That of the batch."""
        return self.batch.shard

    def weights(self, p: Tensor) -> Tensor:
        """p."""
        return p

    def rest(self, p: Tensor) -> list[Tensor | None]:
        """Nothing is missing."""
        return []

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """d."""
        return dots


@dataclass(frozen=True)
class Drawn:
    """What a draw of k from the candidates of all ranks goes by."""

    rows: SelectorRows
    p: Tensor  # [M]
    error_norms: Tensor | None  # [M]
    k: int
    may_move: bool  # whether a sample may be computed on another rank; on all ranks the same


class Sampled:
    """k of M candidates are computed; equations in mts_fast/sampling/estimators.py.

    The draw is one of the candidates of all ranks, made by the first one.
    """

    def __init__(
        self,
        ranks: Ranks,
        candidates: Candidates,
        head: Head | None,
        batch: CheckedBatch,
        drawn: Drawn,
    ) -> None:
        self._ranks = ranks
        self._candidates = candidates
        self._all = batch
        self._norms = drawn.error_norms
        self.completed = () if head is None else head.numbers
        self.sizes = size_measure(drawn.p, self._norms)
        inclusion = inclusion_probabilities(self.sizes, drawn.k)
        # samples of one class and source have gradients that are alike
        strata = 2 * drawn.rows.classes + drawn.rows.is_synthetic

        def draw() -> Tensor:
            with seeded(ranks, inclusion):
                return systematic_sample(inclusion, drawn.k, strata=strata)

        # rank 0's, since sums on a GPU may differ in their last bits
        of_first = Shard((drawn.k, *[0] * (ranks.size - 1)), ranks.index)
        (indices,) = ranks.rows("the draw", of_first, lambda: [draw()])
        self.draw = Draw(indices, inclusion)
        self._p = drawn.p
        self.noise: Tensor | None = None  # [k], residual part of each cotangent
        self.signal: Tensor | None = None  # [k], each cotangent
        self._regression: Regression | None = None
        statistics = candidates.statistics
        placed = place(ranks, batch, indices, may_move=drawn.may_move)
        self.shard = placed.shard
        self.batch: LabelledBatch = placed.batch
        self._rows_here = placed.rows
        if statistics.modules:
            self.batch = ComputedBatch(
                self.batch.inputs,
                self.batch.labels,
                self.shard.mine(self.draw.expansion(drawn.p)),
                statistics,
                float(statistics.size),
                name=batch.name,
            )

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm takes the statistics of all candidates, in one piece."""
        return bool(self._candidates.statistics.modules) and self._candidates.parts == 1

    @property
    def losses_of_stage_1(self) -> Tensor:
        """Of the computed samples here, where none has come from another rank."""
        return self._candidates.losses[self._rows_here]

    @property
    def independent_in_eval_mode(self) -> LabelledBatch | None:
        """The computed samples, or of a single one two candidates; None where there are none, or
        BatchNorm takes the batch's statistics in eval mode, too."""
        without_running = any(m.running_mean is None for m in self._candidates.statistics.modules)
        if without_running or len(self._all) < 2:
            return None
        if len(self.batch) < 2:
            return self._all.at(slice(0, 2))
        return LabelledBatch(self.batch.inputs, self.batch.labels, name=self.batch.name)

    @property
    def note(self) -> str:
        """Why there is no control variate; "" where there is one."""
        return self._candidates.note

    @property
    def gradient_sizes(self) -> Tensor:
        """p n [M], what each candidate's part of the classifier's gradient is taken to measure."""
        return self._p if self._norms is None else self._p * self._norms

    def weights(self, p: Tensor) -> Tensor:
        """c p [k]."""
        return self.draw.weights(p)

    def rest(self, p: Tensor) -> list[Tensor | None]:
        """The last layer's part by the difference estimator: sum_j r_j e_j h_j^T."""
        r = self._all.shard.mine(self.draw.left_out(p))
        gradient = self._candidates.last_layer_gradient(r)
        return [gradient.get(i) for i in self.completed]

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """D [M] of the regression estimator; also notes what it says of its own variance."""
        approximate = self._approximate_dots(direction, dots.dtype)
        regression = regression_estimator(self.draw, p, dots, approximate)
        at = self.draw.indices
        slope_of_p = (p * (1 - torch.sigmoid(z.detach())))[at].to(dots.dtype)
        weights = self.draw.weights(p).to(dots.dtype)
        mean = (weights * dots).sum() / weights.sum().clamp(min=torch.finfo(dots.dtype).tiny)
        self.noise = slope_of_p * regression.residuals
        self.signal = slope_of_p * (dots - mean)
        self._regression = regression
        return regression.dots

    def _approximate_dots(self, direction: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """dhat [M]; 0 on ranks that know none, None where one process does not."""

        def here() -> Tensor | None:
            return self._candidates.approximate_dots(direction)

        if self._ranks.size == 1:
            return here()

        def rows() -> list[Tensor]:
            values = here()
            zeros = torch.zeros(len(self._all), dtype=dtype, device=self._all.labels.device)
            return [zeros if values is None else values.to(dtype)]

        return self._ranks.rows("approximate dots", self._all.shard, rows)[0]

    def variance(self) -> Tensor | None:
        """[], of the selector's gradient by drawing over that of the batch; None without dots."""
        if self.noise is None or self.signal is None:
            return None
        over, under = variance_ratio(self.draw, self.draw.inclusion, self.noise, self.signal)
        return over / under.clamp(min=torch.finfo(under.dtype).tiny)

    def statistics(
        self, p: Tensor, outliers: Tensor, learned: Sampled | None
    ) -> SamplingStatistics:
        """Of this draw, for the weights p of row 9; `learned`: the draw with dots."""
        weights = self.draw.weights(p)
        regression = None if learned is None else learned._regression
        return SamplingStatistics(
            computed=torch.full_like(weights[0], len(weights)),
            effective_samples=weights.sum().square() / weights.square().sum(),
            largest_weight=weights.max(),
            outliers=outliers,
            slope=None if regression is None else regression.slope,
            correlation=None if regression is None else regression.correlation,
            variance=None if learned is None else learned.variance(),
        )
