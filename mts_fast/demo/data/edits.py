"""Random image edits: batched affine maps plus a smooth displacement, and pixel noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# control points of the smooth displacement, per side
ELASTIC_GRID = 4


@dataclass(frozen=True)
class Edit:
    """Standard deviations of each part of an edit."""

    rotation: float  # degrees
    shear: float
    log_scale: float
    shift: float  # of half the image
    elastic: float  # displacement of control points, of half the image
    noise: float  # of pixel values in [0, 1]


def edit_images(images: Tensor, edit: Edit, generator: torch.Generator) -> Tensor:
    """Edited copies of images [N, 1, H, W] with values in [0, 1]."""
    n = len(images)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    angle = normal(n) * math.radians(edit.rotation)
    scale = (normal(n) * edit.log_scale).exp()
    shear = normal(n) * edit.shear
    cos, sin = angle.cos() * scale, angle.sin() * scale
    linear = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], 1).view(n, 2, 2)
    affine = torch.cat([linear, normal(n, 2, 1) * edit.shift], dim=2)  # [N, 2, 3]
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    bend = F.interpolate(
        normal(n, 2, ELASTIC_GRID, ELASTIC_GRID) * edit.elastic,
        size=images.shape[2:],
        mode="bicubic",
        align_corners=False,
    )
    grid = grid + bend.permute(0, 2, 3, 1)
    warped = F.grid_sample(images, grid, align_corners=False)
    return (warped + normal(*images.shape) * edit.noise).clamp(0, 1)
