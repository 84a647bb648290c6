"""A selection problem with a known truth: few real images, many synthetic ones, some of them bad.

The stand-in for a generator plants the failures that real ones show: another style, the wrong
class, wild samples and collapsed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.demo.edits import Edit, edit_images
from mts_fast.demo.glyphs import draw_glyphs
from mts_fast.demo.images import LabelledImages, load_digits, load_fashion

# kinds of synthetic samples and the share of each among them; REAL marks real images
KINDS = {
    "good": 0.35,
    "other style": 0.10,
    "wrong class": 0.35,
    "wild": 0.12,
    "collapsed": 0.08,
}
REAL = -1
GOOD = 0
CLASSES = 10
REAL_PER_CLASS = 10
VALIDATION_PER_CLASS = 10

DIGITS_GOOD = Edit(8, 0.1, 0.08, 0.08, 0.12, 0.03)
FASHION_GOOD = Edit(5, 0.05, 0.06, 0.05, 0.05, 0.02)
WILD = Edit(80, 0.8, 0.5, 0.3, 0.3, 0.15)
# the class shown under each label where the generator got it wrong
DIGITS_CONFUSED = (6, 7, 3, 8, 9, 6, 5, 1, 3, 4)
FASHION_CONFUSED = (6, 3, 4, 1, 2, 7, 0, 9, 5, 7)
# the fashion generator's tone curve: gamma and gain of all its images, threshold of the style
GAMMA, GAIN, THRESHOLD = 0.8, 0.95, 0.45


@dataclass(frozen=True)
class Scenario:
    """Images [N, 1, H, W] in [0, 1] with labels [N] of the pool and of the clean sets."""

    pool: LabelledImages  # real images first, then synthetic ones
    kind: Tensor  # [N] REAL, or an index into KINDS
    val: LabelledImages
    test: LabelledImages

    @property
    def is_synthetic(self) -> Tensor:
        """[N] bool."""
        return self.kind != REAL

    @property
    def real(self) -> LabelledImages:
        """The real images of the pool."""
        return self.pool[self.kind == REAL]


def make_scenario(data: str, seed: int, root: str | None = None) -> Scenario:
    """The scenario on "digits" or "fashion" for one seed; `root` holds the fashion IDX files."""
    generator = torch.Generator().manual_seed(seed)
    if data == "digits":
        everything = load_digits()
        split = _split(everything.labels, generator)
        real, val = everything[split[0]], everything[split[1]]
        test = everything[split[2]]
        synthesize = _digits(real, generator)
        count = 4000
    else:
        train, test = load_fashion(root)
        split = _split(train.labels, generator)
        real, val = train[split[0]], train[split[1]]
        # base images are real ones outside the pool, so that good synthetic images add information
        synthesize = _fashion(train[split[2]], generator)
        count = 8000
    sizes = [round(share * count) for share in KINDS.values()]
    kind = torch.repeat_interleave(torch.arange(len(KINDS)), torch.tensor(sizes))
    labels = torch.randint(CLASSES, (len(kind),), generator=generator)
    images = torch.cat([synthesize(k, labels[kind == k]) for k in range(len(KINDS))])
    pool = LabelledImages(torch.cat([real.images, images]), torch.cat([real.labels, labels]))
    return Scenario(pool, torch.cat([torch.full((len(real),), REAL), kind]), val, test)


def _split(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the real set, of the validation set (both stratified) and of all others."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(order)
    for c in range(CLASSES):
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    last = REAL_PER_CLASS + VALIDATION_PER_CLASS
    real = rank < REAL_PER_CLASS
    rest = rank >= last
    return tuple(mask.nonzero().flatten() for mask in (real, ~real & ~rest, rest))  # type: ignore[return-value]


Synthesize = Callable[[int, Tensor], Tensor]


def _pick(pool: LabelledImages, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One random image of the pool [n, 1, H, W] for each label [n]."""
    images = pool.images.new_empty(len(labels), *pool.images.shape[1:])
    for c in labels.unique().tolist():
        members = (labels == c).nonzero().flatten()
        candidates = (pool.labels == c).nonzero().flatten()
        chosen = torch.randint(len(candidates), (len(members),), generator=generator)
        images[members] = pool.images[candidates[chosen]]
    return images


def _digits(real: LabelledImages, generator: torch.Generator) -> Synthesize:
    size = real.images.shape[-1]
    printed = LabelledImages(*draw_glyphs(size, symbols=False))
    symbols = draw_glyphs(size, symbols=True)[0]

    def synthesize(kind: int, labels: Tensor) -> Tensor:
        name = list(KINDS)[kind]
        if name == "other style":
            base = _pick(printed, labels, generator)
        elif name == "wrong class":
            base = _pick(real, torch.tensor(DIGITS_CONFUSED)[labels], generator)
        elif name == "collapsed":
            chosen = torch.randint(len(symbols), (len(labels),), generator=generator)
            base = symbols[chosen]
        else:
            base = _pick(real, labels, generator)
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
            base = _pick(base_images, shown, generator)
        images = edit_images(base, WILD if name == "wild" else FASHION_GOOD, generator)
        if name == "other style":
            images = (images > THRESHOLD).float()
        return images**GAMMA * GAIN

    return synthesize
