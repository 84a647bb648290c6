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
from mts_fast.training.batch import CheckedBatch
from mts_fast.training.sampled.batch_statistics import ComputedBatch
from mts_fast.training.sampled.candidates import Candidates


class Part(Protocol):
    """The samples that are run, and what they stand for."""

    @property
    def batch(self) -> LabelledBatch:
        """The samples that are run."""

    def weights(self, p: Tensor) -> Tensor:
        """The weights of the samples that are run here, for weights p of the batch."""

    def all_weights(self, p: Tensor) -> Tensor:
        """The same for the samples that all ranks run."""

    def completed(self, gradient: list[Tensor | None], p: Tensor) -> list[Tensor | None]:
        """The gradient of sum p l over the batch, from that of the weighted samples."""

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """What takes the place of d in row 7, for the whole batch."""


@dataclass(frozen=True)
class Whole:
    """Every sample is computed."""

    batch: CheckedBatch

    def weights(self, p: Tensor) -> Tensor:
        """Those of this rank."""
        return self.batch.shard.mine(p)

    def all_weights(self, p: Tensor) -> Tensor:
        """p."""
        return p

    def completed(self, gradient: list[Tensor | None], p: Tensor) -> list[Tensor | None]:
        """The gradient itself."""
        return gradient

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """d."""
        return dots


class Sampled:
    """k of M candidates are computed; equations in mts_fast/sampling/estimators.py."""

    def __init__(self, candidates: Candidates, batch: CheckedBatch, p: Tensor, k: int) -> None:
        self._candidates = candidates
        self._all = batch
        self.sizes = size_measure(p, candidates.error_norms)
        inclusion = inclusion_probabilities(self.sizes, k)
        # samples of one class and source have gradients that are alike
        strata = 2 * batch.classes + batch.is_synthetic
        self.draw = Draw(systematic_sample(inclusion, k, strata=strata), inclusion)
        self._p = p
        self.noise: Tensor | None = None  # [k], residual part of each cotangent
        self.signal: Tensor | None = None  # [k], each cotangent
        self._regression: Regression | None = None
        computed = batch.at(self.draw.indices)
        statistics = candidates.statistics
        if statistics.modules:
            computed = ComputedBatch(
                computed.inputs,
                computed.labels,
                self.draw.expansion(p),
                statistics,
                float(statistics.size),
                name=batch.name,
            )
        self.batch: LabelledBatch = computed

    @property
    def has_statistics(self) -> bool:
        """Whether BatchNorm takes the statistics of all candidates, in one piece."""
        return bool(self._candidates.statistics.modules) and self._candidates.parts == 1

    @property
    def losses_of_stage_1(self) -> Tensor:
        """[k], of the computed samples."""
        return self._candidates.losses[self.draw.indices]

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
        norms = self._candidates.error_norms
        return self._p if norms is None else self._p * norms

    def weights(self, p: Tensor) -> Tensor:
        """c p [k]."""
        return self.draw.weights(p)

    def all_weights(self, p: Tensor) -> Tensor:
        """c p [k]: one rank draws."""
        return self.weights(p)

    def completed(self, gradient: list[Tensor | None], p: Tensor) -> list[Tensor | None]:
        """The last layer's part by the difference estimator: plus sum_j r_j e_j h_j^T."""
        whole = list(gradient)
        for i, part in self._candidates.last_layer_gradient(self.draw.left_out(p)).items():
            old = whole[i]
            whole[i] = part if old is None else old + part.to(old.dtype)
        return whole

    def spread(self, dots: Tensor, direction: Sequence[Tensor], p: Tensor, z: Tensor) -> Tensor:
        """D [M] of the regression estimator; also notes what it says of its own variance."""
        approximate = self._candidates.approximate_dots(direction)
        regression = regression_estimator(self.draw, p, dots, approximate)
        at = self.draw.indices
        slope_of_p = (p * (1 - torch.sigmoid(z.detach())))[at].to(dots.dtype)
        weights = self.draw.weights(p).to(dots.dtype)
        mean = (weights * dots).sum() / weights.sum().clamp(min=torch.finfo(dots.dtype).tiny)
        self.noise = slope_of_p * regression.residuals
        self.signal = slope_of_p * (dots - mean)
        self._regression = regression
        return regression.dots

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
