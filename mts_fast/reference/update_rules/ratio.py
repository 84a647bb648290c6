"""The slope of a ratio of moments, m / (r + eps), without the terms that cancel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mts_fast.reference.update_rules.rule import Number


class Moment(NamedTuple):
    """A running mean, linear in its new value x: decay * old + fresh * x, old None for zeros."""

    fresh: Number
    decay: Number
    old: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """The mean once x is in it."""
        value = self.fresh * x
        return value if self.old is None else self.decay * self.old + value


def ratio_slope(g: Tensor, root: Tensor, eps: Number, mean: Moment, square: Moment) -> Tensor:
    """d/dg of m / (r + eps), with m = mean(g) and r^2 = square(g^2); root is r.

    (m' r - m r' + m' eps) / (r + eps)^2 with m' = mean.fresh, r' = square.fresh g / r. The g^2 of
    m' r^2 and m r' r cancel; what is left holds the old moments m0 and v0 only:

        (mean.fresh square.decay v0 - mean.decay square.fresh m0 g) / r,

    and m0 is zero wherever v0 is.

    Subtracting the cancelling terms in floating point would leave noise alone at the first step,
    where the slope is eps / (r + eps)^2. Where r is 0 the value has no meaning; the noise mask
    sets it to 0.
    """
    # a product and not full_like(root, ...): the scalars may be tensors on the device
    rise = torch.ones_like(root) * (eps * mean.fresh)
    if square.old is not None:
        old = (mean.fresh * square.decay) * square.old
        if mean.old is not None:
            old = old - (mean.decay * square.fresh) * mean.old * g
        rise = rise + old / root.masked_fill(root == 0, 1.0)
    return rise / (root + eps) ** 2
