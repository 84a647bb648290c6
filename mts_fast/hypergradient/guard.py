"""The invariant that every engine's dots must meet: sum_i p_i d_i = <kappa v, grad L>.

It sees missed parameters, replayed masks that differ, differences below rounding, and derivatives
that autograd does not take; it does not see coupled samples or a wrong sample axis, whose sums are
right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mts_fast._multi_tensor import inner_product
from mts_fast.hypergradient.precision import is_low_precision

# the gap of right dots was at most 5e-5 (exact engines, float32), 4e-3 (16 bits) and 5.5e-3
# (differences), and 0.012 to 0.7 of wrong ones (CPU, 2026).
EXACT, EXACT_16_BIT, DIFFERENCES = 1e-3, 2e-2, 1e-2
# in float64 right dots were at most 1e-12 off, and differences 1e-9 (a kink may add its step, 1e-5)
EXACT_64_BIT, DIFFERENCES_64_BIT = 1e-7, 1e-4
# of cross-entropies with a mean of 1e-6 to 1e-12 the gap was at most 1.1 eps / l (CPU, 2026)
SATURATED = 4
# roundings of the largest term that the two sums may differ by where everything cancels
ROUNDINGS = 64


def invariant_gap(
    p: Tensor,
    dots: Tensor,
    gradient: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """|sum p d - <u, g>| / max(sum p |d|, |<u, g>|) [], u = kappa v; 0 where both sides are 0.

    `total` sums a number over the ranks that have shards of gradient and direction.
    """
    pairs = [(g, u) for g, u in zip(gradient, direction, strict=True) if g is not None]
    expected = inner_product([g for g, _ in pairs], [u for _, u in pairs], dots.dtype)
    if total is not None:
        expected = total(expected)
    weighted = p * dots
    gap = (weighted.sum() - expected).abs()
    scale = torch.linalg.vector_norm(weighted, 1).maximum(expected.abs())
    return gap / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def saturation(p: Tensor, losses: Tensor, eps: float, *, logarithmic: bool) -> Tensor:
    """What rounding may add to the gap where the losses are near 0, [].

    Near its minimum a loss has a gradient e by the logits that is far smaller than the numbers it
    is the difference of, so their rounding is eps / |e| of it. A cross-entropy has |e| ~ l, a
    square |e| ~ sqrt(l); l is the weighted mean loss.

    Args:
        p: [B], weights (or with random signs).
        losses: [B].
        eps: spacing at 1 of the dtype that the logits are computed in.
        logarithmic: whether the loss is a cross-entropy or the like.
    """
    weights = p.abs()
    mean = weights @ losses.to(p.dtype).abs() / weights.sum()
    size = mean if logarithmic else mean.sqrt()
    return SATURATED * eps / size.clamp(min=torch.finfo(p.dtype).tiny)


def is_rounding(
    p: Tensor,
    dots: Tensor,
    gradient: Sequence[Tensor | None],
    direction: Sequence[Tensor],
    total: Callable[[Tensor], Tensor] | None = None,
) -> bool:
    """Whether rounding of the two sums explains a gap, as where all of d is noise; waits for the
    device. `total` as for `invariant_gap`."""
    pairs = [(g, u) for g, u in zip(gradient, direction, strict=True) if g is not None]
    products = [(g * u).double() for g, u in pairs]
    sums = torch.stack([torch.stack([t.sum(), t.square().sum()]) for t in products]).sum(0)
    along, squares = sums if total is None else total(sums)
    here = (p * dots).double()
    size = (squares + here.square().sum()).sqrt()
    gap = (here.sum() - along).abs()
    return bool(gap <= ROUNDINGS * torch.finfo(dots.dtype).eps * size)


def bound(engine: str, parameters: Sequence[Tensor]) -> float:
    """The largest gap that right dots of an engine may have."""
    is_float64 = all(p.dtype == torch.float64 for p in parameters)
    if engine == "finite_difference":
        return DIFFERENCES_64_BIT if is_float64 else DIFFERENCES
    if is_low_precision(parameters):
        return EXACT_16_BIT
    return EXACT_64_BIT if is_float64 else EXACT


def unit_roundoff(parameters: Sequence[Tensor], losses: Tensor) -> float:
    """Spacing at 1 of the dtype that the logits are computed in: 16-bit under autocast."""
    dtype = torch.bfloat16 if is_low_precision(parameters) else losses.dtype
    return torch.finfo(dtype).eps


def random_signs(p: Tensor, number: int) -> Tensor:
    """+1 or -1 for each sample [B], drawn from a generator of its own: with differences the sum
    over the batch alone may be right by chance, though autograd's gradient is another one."""
    generator = torch.Generator().manual_seed(number)
    signs = torch.randint(2, p.shape, generator=generator).to(p.device, p.dtype)
    return 2 * signs - 1
