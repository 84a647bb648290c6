"""What k computed samples say of all M: the difference and the regression estimator.

A is the set of computed samples, c_j = 1 / pi_j their weights; r_j = p_j - 1_A c_j p_j below is the
part of a sample's weight that the draw has left out (negative where it counts too much).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# computed samples from which on a slope is fitted
FITTED = 4


class Draw(NamedTuple):
    """The computed samples A of M candidates."""

    indices: Tensor  # int64 [k], ascending
    inclusion: Tensor  # pi [M], float64

    def expansion(self, like: Tensor) -> Tensor:
        """c [k] = 1 / pi of the computed samples."""
        return (1 / self.inclusion[self.indices]).to(like.dtype)

    def weights(self, p: Tensor) -> Tensor:
        """c p [k] (Horvitz and Thompson): the expectation over draws of sum_A c p x is sum p x."""
        return p[self.indices] * self.expansion(p)

    def left_out(self, p: Tensor) -> Tensor:
        """r [M] = p - 1_A c p, of expectation 0.

        The difference estimator adds sum_j r_j y_j of something known for all M, y, to
        sum_A c p x: unbiased for any y, and exact where y = x.
        """
        return p.index_add(0, self.indices, self.weights(p), alpha=-1)


class Regression(NamedTuple):
    """Dots of all M candidates from those of A, by regression on approximations of all M."""

    dots: Tensor  # [M], what takes the place of d in row 7
    slope: Tensor  # b []
    correlation: Tensor  # [], of d and dhat over A
    residuals: Tensor  # d - b dhat [k], less their mean


def difference_estimator(
    draw: Draw, dots: Tensor, approximate: Tensor | None, slope: Tensor
) -> Tensor:
    """D_j [M] = b dhat_j + 1_A c_j (d_j - b dhat_j), of expectation d_j for any fixed slope b."""
    c = draw.expansion(dots)
    if approximate is None:
        everywhere = dots.new_zeros(len(draw.inclusion))
    else:
        everywhere = slope * approximate
        dots = dots - everywhere[draw.indices]
    return everywhere.index_add(0, draw.indices, c * dots)


def regression_estimator(
    draw: Draw, p: Tensor, dots: Tensor, approximate: Tensor | None
) -> Regression:
    """D_j = b dhat_j + 1_A c_j (r_j - rbar), r = d - b dhat, rbar = sum_A c p r / sum_A c p.

    sum_j x_j D_j then estimates sum_j x_j (d_j - constant), which is what row 7 needs: its
    cotangent does not change when a constant is added to all dots.

    Args:
        draw: of the M candidates.
        p: [M], the weights that were drawn with.
        dots: d [k] of the computed samples.
        approximate: dhat [M], of every candidate; None: none are known (b = 0).

    Notes:
        b = sum_A c p (dhat - mean)(d - mean) / sum_A c p (dhat - mean)^2, 0 where that is 0. With
        k = M, D is d less a constant. The fitted slope and the ratio mean have a bias of O(1/k).
        Below 4 samples no slope is fitted: b = 1, since dhat is a part of d; and of a single one
        rbar = 0, which is unbiased.

    Source: the regression estimator of survey sampling (Cochran 1977, 7.1), docs/sampling.md.
    """
    weights = draw.weights(p).to(dots.dtype)
    share = weights / weights.sum().clamp(min=torch.finfo(dots.dtype).tiny)
    slope = correlation = dots.new_zeros(())
    mean = (share * dots).sum()
    residuals = dots - mean
    if approximate is not None:
        approximate = approximate.to(dots.dtype)
        here = approximate[draw.indices]
        centred = here - (share * here).sum()
        product = (share * centred * residuals).sum()
        square, other = (share * centred.square()).sum(), (share * residuals.square()).sum()
        slope = torch.where(square > 0, product / square, slope)
        if len(dots) < FITTED:
            slope = torch.ones_like(slope)
        correlation = torch.where(
            square * other > 0, product / (square * other).sqrt(), correlation
        )
        residuals = residuals - slope * centred
        mean = mean - slope * (share * here).sum()
    if len(dots) == 1:
        mean = torch.zeros_like(mean)
        residuals = dots if approximate is None else dots - slope * approximate[draw.indices]
    estimates = difference_estimator(draw, dots - mean, approximate, slope)
    return Regression(estimates, slope, correlation, residuals)


def variance_ratio(
    draw: Draw, inclusion: Tensor, noise: Tensor, signal: Tensor
) -> tuple[Tensor, Tensor]:
    """(numerator, denominator) of the variance of drawing, relative to that of the batch itself.

    numerator = sum_A c (1 / pi' - 1) noise^2 estimates the variance of sum_A' c' noise_j g_j over
    draws with other inclusion probabilities pi', for vectors g_j of like length without
    correlation; denominator = sum_A c signal^2 that of the sum over a random batch of M.

    Args:
        draw: the draw that the values are known of.
        inclusion: pi' [M], of the draw whose variance is asked for.
        noise, signal: [k], of the computed samples.
    """
    c = draw.expansion(noise)
    excess = (1 / inclusion[draw.indices] - 1).to(noise.dtype)
    # a mean, and where it was fitted a slope, have taken a part of the noise
    k = len(noise)
    lost = 2 if k >= FITTED else 1
    return k / max(k - lost, 1) * (c * excess * noise.square()).sum(), (c * signal.square()).sum()
