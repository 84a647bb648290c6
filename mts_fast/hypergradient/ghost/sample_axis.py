"""Where the samples lie in a layer's output, found by signing the samples' cotangents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# b of a signed batch may differ from the signed b by so many roundings, and by no more than that
# share in all: where samples are independent the factors, powers of two, commute with rounding.
ROUNDINGS = 1000
LARGEST_GAP = 0.05


def rounding_share(dtype: torch.dtype) -> float:
    """Relative gap that rounding may explain."""
    return min(LARGEST_GAP, ROUNDINGS * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class SampleAxis:
    """The samples lie on one axis of n = B r entries.

    Sample i owns r entries side by side (i r and on), or, where `interleaved`, every B-th entry
    (i, i + B, ...), as in torch's attention.
    """

    axis: int = 0
    interleaved: bool = False

    def fits(self, shape: torch.Size, batch_size: int) -> bool:
        """Whether a tensor of that shape can have its samples there."""
        return self.axis < len(shape) and shape[self.axis] % batch_size == 0

    def expand(self, per_sample: Tensor, like: Tensor) -> Tensor:
        """per_sample [B] as a tensor that broadcasts against `like`."""
        length = like.shape[self.axis]
        times = length // len(per_sample)
        spread = per_sample.repeat_interleave(times)
        if self.interleaved:
            spread = per_sample.repeat(times)
        shape = [1] * like.ndim
        shape[self.axis] = length
        return spread.to(like.dtype).view(shape)

    def samples(self, values: Tensor, batch_size: int) -> Tensor:
        """[B, r, ...]: the samples first; a view."""
        moved = values.movedim(self.axis, 0)
        if self.interleaved:
            return moved.unflatten(0, (-1, batch_size)).transpose(0, 1)
        return moved.unflatten(0, (batch_size, -1))

    def dot(self, x: Tensor, y: Tensor, batch_size: int, *, overwrite: bool) -> Tensor:
        """<x, y> per sample [B], accumulated in float32 or wider; x may broadcast to y.

        `overwrite` allows x to be lost: a product in memory of its own took 8 times as long (all
        layers of a ViT in a step, 2 CPU cores), though it did not in a loop over one layer.
        """
        if x.dtype in (torch.bfloat16, torch.float16) or x.dtype != y.dtype:
            x, y = x.float(), y.float()
        product = x.mul_(y) if overwrite and x.shape == y.shape else x * y
        return self.samples(product, batch_size).flatten(1).sum(1)


def find_axis(b: Tensor, signed_b: Tensor, signs: Tensor) -> SampleAxis | None:
    """The layout in which signed_b is b with each sample's entries times its sign.

    b is the output's gradient of sum_i l_i, signed_b that of sum_i signs_i l_i. None where there is
    no such layout: samples are mixed.
    """
    allowed = rounding_share(b.dtype)
    for interleaved in (False, True):
        for axis in range(b.ndim):
            layout = SampleAxis(axis, interleaved)
            if layout.fits(b.shape, len(signs)):
                gap = (signed_b - b * layout.expand(signs, b)).norm()
                if gap <= allowed * signed_b.norm():
                    return layout
    return None
