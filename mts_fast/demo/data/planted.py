"""A selection problem with a known truth: few real images, many synthetic ones, some of them bad.

The stand-in for a generator plants the failures that real ones show: another style, the wrong
class, wild samples and collapsed ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mts_fast.demo.data.edits import Edit, edit_images
from mts_fast.demo.data.glyphs import draw_glyphs
from mts_fast.demo.data.images import LabelledImages, load_digits, load_fashion
from mts_fast.demo.data.scenario import CLASSES, REAL, Scenario
from mts_fast.demo.data.splits import random_of_classes, ranks_in_class

# kinds of synthetic samples and the share of each among them
KINDS = {
    "good": 0.35,
    "other style": 0.10,
    "wrong class": 0.35,
    "wild": 0.12,
    "collapsed": 0.08,
}
REAL_PER_CLASS = 10
VALIDATION_PER_CLASS = 10

# images of one kind for labels [n]
Synthesize = Callable[[int, Tensor], Tensor]

DIGITS_GOOD = Edit(8, 0.1, 0.08, 0.08, 0.12, 0.03)
FASHION_GOOD = Edit(5, 0.05, 0.06, 0.05, 0.05, 0.02)
WILD = Edit(80, 0.8, 0.5, 0.3, 0.3, 0.15)
# the class shown under each label where the generator got it wrong
DIGITS_CONFUSED = (6, 7, 3, 8, 9, 6, 5, 1, 3, 4)
FASHION_CONFUSED = (6, 3, 4, 1, 2, 7, 0, 9, 5, 7)
# the fashion generator's tone curve: gamma and gain of all its images, threshold of the style
GAMMA, GAIN, THRESHOLD = 0.8, 0.95, 0.45


def planted_digits(generator: torch.Generator, _: str | None) -> Scenario:
    """scikit-learn's digits; synthetic images are edits of the real ones of the pool."""
    everything = load_digits()
    real, val, test = _split(everything, generator)
    return _make(real, val, test, _digits(real, generator), 4000, generator)


def planted_fashion(generator: torch.Generator, root: str | None) -> Scenario:
    """Fashion-MNIST at 14 x 14.

    Synthetic images are edits of real ones outside the pool, so that good ones add information.
    """
    train, test = load_fashion(root)
    real, val, rest = _split(train, generator)
    return _make(real, val, test, _fashion(rest, generator), 8000, generator)


def _make(
    real: LabelledImages,
    val: LabelledImages,
    test: LabelledImages,
    synthesize: Synthesize,
    count: int,
    generator: torch.Generator,
) -> Scenario:
    sizes = [round(share * count) for share in KINDS.values()]
    kind = torch.repeat_interleave(torch.arange(len(KINDS)), torch.tensor(sizes))
    labels = torch.randint(CLASSES, (len(kind),), generator=generator)
    images = torch.cat([synthesize(k, labels[kind == k]) for k in range(len(KINDS))])
    pool = LabelledImages(torch.cat([real.images, images]), torch.cat([real.labels, labels]))
    is_real = torch.arange(len(pool)) < len(real)
    return Scenario(
        pool=pool,
        kind=torch.cat([torch.full((len(real),), REAL), kind]),
        kinds=tuple(KINDS),
        helpful=("good",),
        clean=real + val,
        candidates=~is_real,
        val=val,
        test=test,
    )


def _split(
    images: LabelledImages, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """The real set, the validation set (both stratified) and all others."""
    rank = ranks_in_class(images.labels, generator)
    last = REAL_PER_CLASS + VALIDATION_PER_CLASS
    is_real, is_rest = rank < REAL_PER_CLASS, rank >= last
    parts = (is_real, ~is_real & ~is_rest, is_rest)
    real, val, rest = (images[mask.nonzero().flatten()] for mask in parts)
    return real, val, rest


def _digits(real: LabelledImages, generator: torch.Generator) -> Synthesize:
    size = real.images.shape[-1]
    printed = LabelledImages(*draw_glyphs(size, symbols=False))
    symbols = draw_glyphs(size, symbols=True)[0]

    def synthesize(kind: int, labels: Tensor) -> Tensor:
        name = list(KINDS)[kind]
        if name == "other style":
            base = random_of_classes(printed, labels, generator)
        elif name == "wrong class":
            base = random_of_classes(real, torch.tensor(DIGITS_CONFUSED)[labels], generator)
        elif name == "collapsed":
            chosen = torch.randint(len(symbols), (len(labels),), generator=generator)
            base = symbols[chosen]
        else:
            base = random_of_classes(real, labels, generator)
        return edit_images(base, WILD if name == "wild" else DIGITS_GOOD, generator)

    return synthesize


def _fashion(base_images: LabelledImages, generator: torch.Generator) -> Synthesize:
    def synthesize(kind: int, labels: Tensor) -> Tensor:
        name = list(KINDS)[kind]
        if name == "collapsed":
            pair = torch.randint(len(base_images), (2, len(labels)), generator=generator)
            base = (base_images.images[pair[0]] + base_images.images[pair[1]]) / 2
        else:
            shown = torch.tensor(FASHION_CONFUSED)[labels] if name == "wrong class" else labels
            base = random_of_classes(base_images, shown, generator)
        images = edit_images(base, WILD if name == "wild" else FASHION_GOOD, generator)
        if name == "other style":
            images = (images > THRESHOLD).float()
        return images**GAMMA * GAIN

    return synthesize
