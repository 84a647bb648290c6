"""Batches of pictures from bytes, standardised, and their augmentation."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# of ImageNet, which pretrained weights expect
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# aspect ratios of random crops
RATIOS = (3 / 4, 4 / 3)


def batch_of(pixels: np.ndarray, indices: Tensor, device: torch.device) -> Tensor:
    """Pictures [B, 3, size, size], float32, standardised as pretrained weights expect."""
    return standardized(_raw(pixels, indices, device))


def augmented_batch(
    pixels: np.ndarray,
    indices: Tensor,
    device: torch.device,
    seed: tuple[int, int],
    *,
    crop: float = 1.0,
    jitter: float = 0.0,
    flip: bool = False,
) -> Tensor:
    """The same, each changed by numbers that its index and `seed` (of the run, epoch) alone draw:
    batches and workers do not matter.

    Args:
        crop: least share of the area that a random crop keeps; it is scaled back to the size.
        jitter: brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter.
        flip: half of the pictures are mirrored.
    """
    images = _raw(pixels, indices, device)
    if not len(indices) or (crop >= 1 and not jitter and not flip):
        return standardized(images)
    draws = torch.stack([_draws(seed, int(i)) for i in indices]).to(device)
    if crop < 1 or flip:
        images = _cropped(images, draws, crop, flip)
    if jitter:
        images = _jittered(images, draws, jitter)
    return standardized(images)


def standardized(images: Tensor) -> Tensor:
    """By ImageNet's mean and deviation of each channel."""
    mean, deviation = (images.new_tensor(v)[:, None, None] for v in (MEAN, DEVIATION))
    return (images - mean) / deviation


def _raw(pixels: np.ndarray, indices: Tensor, device: torch.device) -> Tensor:
    chosen = torch.from_numpy(np.asarray(pixels[indices.cpu().numpy()]))
    return chosen.to(device).permute(0, 3, 1, 2).contiguous().float() / 255


def _draws(seed: tuple[int, int], index: int) -> Tensor:
    """Eight uniform numbers of a picture in an epoch."""
    digest = hashlib.sha256(f"{seed[0]} {seed[1]} {index}".encode()).digest()
    numbers = np.frombuffer(digest, "<u4").astype(np.float64) / 2**32
    return torch.from_numpy(numbers.astype(np.float32))


def _cropped(images: Tensor, draws: Tensor, least: float, flip: bool) -> Tensor:
    area = least + (1 - least) * draws[:, 0]
    low, high = np.log(RATIOS)
    ratio = torch.exp(low + (high - low) * draws[:, 1]) if least < 1 else torch.ones_like(area)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = (2 * draws[:, 2] - 1) * (1 - width)
    y = (2 * draws[:, 3] - 1) * (1 - height)
    side = torch.where(draws[:, 4] < 0.5, -1.0, 1.0) if flip else torch.ones_like(area)
    zero = torch.zeros_like(area)
    affine = torch.stack([side * width, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jittered(images: Tensor, draws: Tensor, strength: float) -> Tensor:
    factors = 1 + strength * (2 * draws[:, 5:8] - 1)
    brightness, contrast, saturation = (f[:, None, None, None] for f in factors.unbind(1))
    images = images * brightness
    grey = images.new_tensor((0.299, 0.587, 0.114))[:, None, None]
    mean = (images * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    tone = (images * grey).sum(1, keepdim=True)
    return (tone + (images - tone) * saturation).clamp(0, 1)
