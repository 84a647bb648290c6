"""Which samples a step computes: inclusion probabilities, and a draw of exactly k of M."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast._check import (
    check_device,
    check_finite,
    check_floating,
    check_int,
    check_integer,
    check_length,
    check_not_empty,
    fail,
)

# shares of the three parts of a sample's size measure: its part of the gradient's norm (q), which
# makes the variance small; its weight (p), which bounds c p by 1 / (0.3 k); and 1 / M, which keeps
# every sample's chance above 0.
BY_NORM, BY_WEIGHT, EVEN = 0.6, 0.3, 0.1


def size_measure(p: Tensor, error_norms: Tensor | None = None) -> Tensor:
    """Sizes a_j [M] that inclusion probabilities are proportional to; they sum to 1.

    a_j = 0.6 q_j + 0.3 p_j + 0.1 / M with q_j proportional to p_j n_j, n the norm of the loss's
    gradient at the logits; q = p where all p n are 0 or no norms are known. In float64.

    Args:
        p: [M], weights, 0 or more; they need not sum to 1.
        error_norms: n [M], 0 or more.

    Source: docs/sampling.md.
    """
    op = "size_measure"
    p = _checked(op, "p", p).double()
    q = p
    if error_norms is not None:
        check_floating(op, "error_norms", error_norms, ndim=1)
        check_length(op, "error_norms", error_norms, len(p))
        check_device(op, "error_norms", error_norms, p.device, "p")
        product = p * error_norms.double()
        q = torch.where(product.sum() > 0, product, p)
    size = len(p)
    return BY_NORM * _shares(q) + BY_WEIGHT * _shares(p) + EVEN / size


def inclusion_probabilities(sizes: Tensor, k: int) -> Tensor:
    """pi_j = min(1, s a_j) with s such that sum pi = k.

    Args:
        sizes: a [M], positive; only their ratios count.
        k: how many samples a draw has, between 1 and M.

    Returns:
        pi [M], float64, in (0, 1], with the sum k to rounding. No value is read on the host.

    Raises:
        TypeError: sizes that are not floating-point, a k that is no int.
        ValueError: sizes of another shape, empty or (on the CPU) not positive; k outside 1..M.

    Notes:
        s: with a in descending order and the first m at 1, s_m = (k - m) / sum_(j > m) a_j; m is
        the smallest with s_m a_(m+1) <= 1. Since s >= k / sum a, pi_j >= min(1, k a_j / sum a).

    Source: probability proportional to size with a take-all stratum (Saerndal et al. 1992, 3.6.2).

    Example:
        >>> import torch, mts_fast
        >>> sizes = torch.tensor([8.0, 1.0, 1.0, 1.0, 1.0])
        >>> mts_fast.sampling.inclusion_probabilities(sizes, 3).tolist()
        [1.0, 0.5, 0.5, 0.5, 0.5]
    """
    op = "inclusion_probabilities"
    sizes = _checked(op, "sizes", sizes).double()
    if not sizes.is_cuda and not bool((sizes > 0).all()):
        got = f"{float(sizes.min()):g} among them"
        fail(ValueError, op, "sizes", "positive", got, "see size_measure")
    count = len(sizes)
    check_number_of_samples(op, "k", k, count)
    ordered, order = sizes.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # [M], sum of this and all smaller ones
    before = torch.arange(count, device=sizes.device)  # m, the number of larger ones
    scale = (k - before).double() / rest
    fits = (scale * ordered <= 1) & (before < k)
    # the first that fits; m = k - 1 always does, up to rounding
    m = torch.where(fits, before, k - 1).min()
    # gathered, since indexing by a scalar tensor would read it on the host
    scaled = (scale.gather(0, m.view(1)) * ordered).clamp(max=1.0)
    values = torch.where(before < m, torch.ones_like(scaled), scaled)
    return torch.empty_like(values).scatter_(0, order, values)


def systematic_sample(
    inclusion: Tensor,
    k: int,
    *,
    strata: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw exactly k samples so that sample j is among them with probability pi_j.

    The samples are laid end to end in random order, each of length pi_j, and the points
    u, u + 1, ..., u + k - 1 with one uniform u in [0, 1) select those that they fall on.

    Args:
        inclusion: pi [M], of sum k, as `inclusion_probabilities` returns them.
        k: their sum.
        strata: integers [M]; samples of one number lie side by side, so that each stratum has its
            expected count to within 1. Chances stay as they are, and the variance falls by what
            strata differ in.
        generator: where the two draws come from; torch's default one of pi's device if left out.

    Returns:
        Indices [k], ascending, int64. No value is read on the host.

    Raises:
        TypeError, ValueError: as `inclusion_probabilities`.

    Source: randomised systematic sampling (Goodman and Kish 1950; Hartley and Rao 1962).

    Example:
        >>> import torch, mts_fast
        >>> inclusion = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5])
        >>> chosen = mts_fast.sampling.systematic_sample(inclusion, 3)
        >>> len(chosen), 0 in chosen
        (3, True)
    """
    op = "systematic_sample"
    inclusion = _checked(op, "inclusion", inclusion).double()
    count = len(inclusion)
    check_number_of_samples(op, "k", k, count)
    device = inclusion.device
    order = torch.randperm(count, generator=generator, device=device)
    if strata is not None:
        check_integer(op, "strata", strata, ndim=1)
        check_length(op, "strata", strata, count)
        check_device(op, "strata", strata, device, "inclusion")
        order = order[strata[order].argsort(stable=True)]
    u = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    return points_on(inclusion[order], order, u, k)


def points_on(inclusion: Tensor, order: Tensor, u: Tensor, k: int) -> Tensor:
    """The samples [k] that the points u + i fall on, ascending; inclusion [M] in that order."""
    ends = inclusion.cumsum(0)
    points = u + torch.arange(k, device=inclusion.device)
    # rounding may leave the last end just below k
    at = torch.searchsorted(ends, points, right=True).clamp(max=len(order) - 1)
    return order[at].sort().values


def check_number_of_samples(op: str, arg: str, k: object, count: int) -> int:
    """An int between 1 and the number of samples."""
    number = check_int(op, arg, k, low=1, hint="pass how many samples are computed")
    if number > count:
        hint = "pass fewer, or a share of the batch such as compute=0.25"
        fail(ValueError, op, arg, f"at most the number of samples ({count})", number, hint)
    return number


def _checked(op: str, arg: str, value: Tensor) -> Tensor:
    check_floating(op, arg, value, ndim=1)
    check_not_empty(op, arg, value)
    if not value.is_cuda:
        check_finite(op, arg, value)
    return value


def _shares(sizes: Tensor) -> Tensor:
    """Divided by their sum; even where that is 0."""
    total = sizes.sum()
    even = torch.full_like(sizes, 1 / len(sizes))
    return torch.where(total > 0, sizes / total, even)
