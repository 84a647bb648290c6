"""A spurious correlation with a known truth: the background's colour mostly tells the class.

The kind of shift of Waterbirds and CelebA. A generator that learned the correlation makes most of
the pool; what helps are its few samples with a random colour. A wrong label has its own colour, so
neither the loss nor the colour alone tells good samples from bad.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.demo.data.edits import Edit, edit_images
from mts_fast.demo.data.images import LabelledImages, load_digits, load_fashion
from mts_fast.demo.data.scenario import CLASSES, REAL, Scenario
from mts_fast.demo.data.splits import random_of_classes, ranks_in_class

# kinds of synthetic samples
KINDS = ("colour of its class", "random colour", "wrong label")
SHARES = (0.5, 0.2, 0.3)
HELPFUL = ("random colour",)
# share of real images with the colour of their class; all others have a random one
BIAS = 0.97
INK, BACKGROUND = 0.9, 0.5
PALETTE = torch.tensor([colorsys.hsv_to_rgb(c / CLASSES, 1, 1) for c in range(CLASSES)])
DIGITS_TEST = 500
DIGITS_EDIT = Edit(rotation=10, shear=0.1, log_scale=0.08, shift=0.08, elastic=0, noise=0.03)
FASHION_NOISE, FASHION_GAMMA = 0.03, 0.9


def coloured_digits(
    generator: torch.Generator,
    _: str | None,
    val_per_class: int = 3,
    shares: Sequence[float] = SHARES,
) -> Scenario:
    """scikit-learn's digits; synthetic images are edits of others than the real ones."""
    digits = load_digits()
    first = len(digits) - DIGITS_TEST
    train, test = digits[torch.arange(first)], digits[torch.arange(first, len(digits))]

    def edit(images: Tensor) -> Tensor:
        return edit_images(images, DIGITS_EDIT, generator)

    return _make(train, test, 200, _kinds(4000, shares), val_per_class, edit, generator)


def coloured_fashion(
    generator: torch.Generator,
    root: str | None,
    val_per_class: int = 10,
    shares: Sequence[float] = SHARES,
) -> Scenario:
    """Fashion-MNIST at 14 x 14; synthetic images are others than the real ones."""
    train, test = load_fashion(root)

    def edit(images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=generator) * FASHION_NOISE
        return (images + noise).clamp(0, 1) ** FASHION_GAMMA

    return _make(train, test, 1000, _kinds(8000, shares), val_per_class, edit, generator)


def paint(images: Tensor, colour: Tensor) -> Tensor:
    """Grey images [n, 1, H, W] on a background of these colours [n]: [n, 3, H, W]."""
    return INK * images + BACKGROUND * (1 - images) * PALETTE[colour][:, :, None, None]


def _kinds(count: int, shares: Sequence[float]) -> Tensor:
    """[about count]: the kind of every synthetic sample."""
    counts = [round(share * count) for share in shares]
    return torch.repeat_interleave(torch.arange(len(KINDS)), torch.tensor(counts))


def _make(
    train: LabelledImages,
    test: LabelledImages,
    reals: int,
    kind: Tensor,
    val_per_class: int,
    edit: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Scenario:
    def any_colour(count: int) -> Tensor:
        return torch.randint(CLASSES, (count,), generator=generator)

    least = int(train.labels.bincount(minlength=CLASSES).min())
    if not 1 <= val_per_class < least:
        expected = f"from 1, so that every class has validation images, to {least - 1}"
        hint = "leave it out, or take fewer"
        fail(ValueError, "demo", "val_per_class", expected, val_per_class, hint)
    rank = ranks_in_class(train.labels, generator)
    val = train[(rank < val_per_class).nonzero().flatten()]
    rest = (rank >= val_per_class).nonzero().flatten()
    rest = rest[torch.randperm(len(rest), generator=generator)]
    real, base = train[rest[:reals]], train[rest[reals:]]
    biased = torch.rand(reals, generator=generator) < BIAS
    real_colour = torch.where(biased, real.labels, any_colour(reals))

    labels = any_colour(len(kind))
    wrong = kind == KINDS.index("wrong label")
    other = (labels + 1 + torch.randint(CLASSES - 1, labels.shape, generator=generator)) % CLASSES
    shown = torch.where(wrong, other, labels)
    colour = torch.where(kind == KINDS.index("random colour"), any_colour(len(kind)), labels)
    synthetic = edit(random_of_classes(base, shown, generator))

    pool = LabelledImages(
        torch.cat([paint(real.images, real_colour), paint(synthetic, colour)]),
        torch.cat([real.labels, labels]),
    )
    pool_colour = torch.cat([real_colour, colour])
    val_colour, test_colour = any_colour(len(val)), any_colour(len(test))
    clean = LabelledImages(paint(val.images, val_colour), val.labels)
    return Scenario(
        pool=pool,
        kind=torch.cat([torch.full((reals,), REAL), kind]),
        kinds=KINDS,
        helpful=HELPFUL,
        clean=clean,
        candidates=torch.ones(len(pool), dtype=torch.bool),
        val=clean,
        test=LabelledImages(paint(test.images, test_colour), test.labels),
        groups=_groups(pool.labels, pool_colour),
        val_groups=_groups(val.labels, val_colour),
        test_groups=_groups(test.labels, test_colour),
    )


def _groups(labels: Tensor, colour: Tensor) -> Tensor:
    """Class, and whether the colour is the class's own: [N] in [0, 2 CLASSES)."""
    return labels + CLASSES * (colour == labels)
