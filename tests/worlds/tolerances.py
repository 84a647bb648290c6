"""How far a right step may be from the oracle, and how distances are measured."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

# precision -> (dots of an exact engine, dots by differences, everything else); for 16 bits
# floors of a few roundings: what counts there is torch's own error
SHARES = {
    "float64": (1e-7, 1e-3, 1e-9),
    "float32": (2e-3, 2e-2, 1e-4),
    "autocast float16": (2e-2, 2e-2, 1e-2),
    "autocast bfloat16": (5e-2, 5e-2, 3e-2),
    "bfloat16": (5e-2, 5e-2, 3e-2),
}
TORCH_ERRORS = 3
# where within its bounds a gradient is tried: Adam's step is not monotone in it
CORNERS = tuple(s * x for s in (-1.0, 1.0) for x in (1.0, 0.75, 0.5, 0.25, 0.1, 0.03, 0.01))
NEAR = 4.0
NEAR_CORNERS = (-1.0, -0.5, 0.5, 1.0)
# what a step may exceed its largest value at these corners by
BETWEEN_CORNERS = 1.25
# a gradient that is noise may be this share of its bound, and its kappa that much larger
TAIL = 1 / 16
# roundings by which the features that a forward gives may be off
FEATURE_ROUNDINGS = 4
ROUNDINGS = 64
# bounds of an optimizer's step are met exactly: its largest step either way
LEEWAY = 1.02
# where torch's own error in 16 bits is that share of the largest true dot, the dots are noise and
# say nothing, as at Adam's first step, where they are nearly 0
NOISE_SHARE = 0.5
# torch keeps NAdam's product of momenta, and a learning rate in a tensor, in float32
SINGLE = 6e-8
SINGLE_EPS, DOUBLE_EPS = 1.2e-7, 2.3e-16
# of what a forward computes in
EPS = {
    "float64": DOUBLE_EPS,
    "float32": SINGLE_EPS,
    "autocast float16": 9.8e-4,
    "autocast bfloat16": 7.9e-3,
    "bfloat16": 7.9e-3,
}
# kappa is 0 where the root of the second moment is below this many roundings of the largest
# gradient: such a gradient is rounding noise
NOISE_BOUND = 8
# entries whose second moment lies this near to that bound may fall on either side of it
NEAR_BOUND = 16
VARIANCE_EPSILON = 1e-8


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.tensordot(weights.to(rows.dtype), rows, dims=([0], [0]))


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where shapes differ or something is not finite."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    difference = (a.detach().double() - b.detach().double()).abs().max().item()
    return difference if difference == difference else float("inf")


def largest_entry(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0
