"""Where kappa would multiply rounding noise: the mask that every backend and every test shares.

A rule that divides by the root of a second moment has a kappa of about lr / root. Where that root
is no more than the rounding of the gradient (the bias of a layer before BatchNorm, whose gradient
is exactly 0 without rounding), kappa is lr / eps times noise and drowns the rest of a direction.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mts_fast._multi_tensor import largest_entry

# in units of eps max |g|: sums of gradients that cancel were seen to leave 1 to 3
NOISE_PLACES = 8


@torch.no_grad()
def largest_gradient(gradients: Iterable[Tensor]) -> Tensor:
    """max |g| [] over all entries of all gradients of a call, float32 or wider.

    0 where it is NaN or infinite: then no entry is taken for noise, and the NaN shows in kappa v.
    Nothing waits for a device.
    """
    largest = largest_entry(list(gradients))
    largest = largest.to(torch.promote_types(largest.dtype, torch.float32))
    return torch.where(largest.isfinite(), largest, 0.0)


def noise_share(dtype: torch.dtype) -> float:
    """The part of max |g| that gradients of this dtype may have by rounding alone: 8 eps, for
    16-bit ones that of float32, in which they are summed up.

    8 eps of bfloat16 are 6 % of the largest gradient. Tried on an MLP and a transformer with
    bfloat16 parameters, after 5 and 60 steps of AdamW: it masked 87 to 99 % of the entries and left
    kappa v a cosine of 0.00 to 0.01 to float64's; with float32's eps the cosine is 0.93 to 1.00.
    """
    return NOISE_PLACES * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def noise_floor(dtype: torch.dtype, largest: Tensor) -> Tensor:
    """noise_share(dtype of g) max |g| []."""
    return noise_share(dtype) * largest


def is_noise(root: Tensor, gradient: Tensor, largest: Tensor) -> Tensor:
    """Where sqrt(v_hat) < noise_share(dtype of g) max |g|, or is 0; bool of the root's shape."""
    root = root.to(torch.promote_types(root.dtype, torch.float32))
    floor = noise_floor(gradient.dtype, largest.to(root.device))
    return (root < floor) | (root == 0)
