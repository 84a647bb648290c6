"""Using the weights: batches that mix clean data with samples drawn by weight.

Weights that a selector has learned say which samples help beside clean data, not instead of it
(docs/using_weights.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mts_fast._check import (
    check_finite,
    check_floating,
    check_int,
    check_integer,
    check_length,
    check_number,
    check_positive_int,
    check_range,
    fail,
)

OP = "MixedBatchSampler"


class MixedBatchSampler(Sampler[list[int]]):
    """Batches of indices: a share of clean samples, the others drawn by weight.

    For a `DataLoader(ConcatDataset([pool, clean]), batch_sampler=...)`: indices below
    `len(weights)` are of the pool, those from there on of the clean set.

    The pool is drawn systematically: in an epoch, a sample occurs as often as its share of the
    weights says, up to one; so the composition of an epoch has far less variance than that of
    independent draws. The clean set is visited in random orders, each sample as often as every
    other up to one.

    Args:
        weights: [N], floating, not negative, not all 0; their scale does not matter.
        clean: number of clean samples, M.
        batch_size: samples of a batch.
        num_batches: batches of an epoch; default: as many as give N draws of the pool, or N where
            all samples are clean.
        clean_share: share of clean samples in every batch, in [0, 1]; the number is rounded.
        labels: classes of the pool [N], for draws that are balanced over the classes that have
            weight: each is drawn equally often, its samples by weight.
        seed: of the draws; epoch e of a seed is always the same (`set_epoch`).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        weights: Tensor,
        clean: int,
        batch_size: int,
        *,
        num_batches: int | None = None,
        clean_share: float = 0.5,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        weights = check_floating(OP, "weights", weights, ndim=1)
        check_finite(OP, "weights", weights)
        _check_weights(weights)
        check_positive_int(OP, "clean", clean)
        check_positive_int(OP, "batch_size", batch_size)
        check_int(OP, "seed", seed)
        check_number(OP, "clean_share", clean_share, at_least=0.0, at_most=1.0)
        share = weights.detach().double().cpu()
        if labels is not None:
            check_integer(OP, "labels", labels, ndim=1)
            check_length(OP, "labels", labels, len(weights))
            share = _balanced(share, labels.cpu().long())
        self._cumulative = (share / share.sum()).cumsum(0)
        self._last = int(share.nonzero().max())
        self.num_clean = round(clean_share * batch_size)
        self.num_drawn = batch_size - self.num_clean
        self._clean = clean
        if num_batches is None:
            num_batches = -(-len(weights) // max(1, self.num_drawn))
        check_positive_int(OP, "num_batches", num_batches)
        self.num_batches = num_batches
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch from the next `iter` on, as torch's DistributedSampler."""
        check_int(OP, "epoch", epoch)
        self._epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed)
        generator.manual_seed(int(torch.randint(2**62, (), generator=generator)) + self._epoch)
        drawn = self._draw(self.num_batches * self.num_drawn, generator)
        clean = _orders(self._clean, self.num_batches * self.num_clean, generator)
        clean = clean + len(self._cumulative)
        for b in range(self.num_batches):
            parts = (
                drawn[b * self.num_drawn : (b + 1) * self.num_drawn],
                clean[b * self.num_clean : (b + 1) * self.num_clean],
            )
            yield torch.cat(parts).tolist()

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Systematic draws in random order: one random start, then equal steps through the mass."""
        start = torch.rand((), dtype=torch.float64, generator=generator)
        places = (torch.arange(count, dtype=torch.float64) + start) / max(1, count)
        drawn = torch.searchsorted(self._cumulative, places, right=True).clamp(max=self._last)
        return drawn[torch.randperm(count, generator=generator)]


def discount_learned(weights: Tensor, label_probability: Tensor, power: float = 1.0) -> Tensor:
    """Weights of samples times what a classifier of everything has not learned of them.

    A sample whose label a classifier trained on the whole pool alike takes for certain teaches a
    new one little beyond what the pool teaches anyway: under a spurious correlation, the
    correlation. So w_i (1 - p(y_i | x_i))^power. The weights have to sort out wrong labels, which
    are not learned either; without a selector, noise would be drawn.

    Args:
        weights: [N], floating, not negative.
        label_probability: [N], floating, in [0, 1]: of each sample's label, under a classifier that
            was trained on the pool without weights.
        power: 0 leaves the weights as they are.

    Returns:
        [N].

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    op = "discount_learned"
    check_floating(op, "weights", weights, ndim=1)
    check_floating(op, "label_probability", label_probability, ndim=1)
    check_length(op, "label_probability", label_probability, len(weights))
    check_number(op, "power", power, at_least=0.0)
    if not bool(((label_probability >= 0) & (label_probability <= 1)).all()):
        low, high = label_probability.aminmax()
        got = f"values from {float(low)} to {float(high)}"
        hint = "take the softmax of the logits at the label"
        fail(ValueError, op, "label_probability", "in [0, 1]", got, hint)
    return weights * (1 - label_probability) ** power


def _check_weights(weights: Tensor) -> None:
    hint = "pass the selector's weights of the pool, for example those of step.weights()"
    expected = "not negative and not all 0"
    if len(weights) == 0:
        fail(ValueError, OP, "weights", expected, "an empty tensor", hint)
    at = int(weights.argmin())
    if weights[at] < 0:
        fail(ValueError, OP, "weights", expected, f"{float(weights[at])} at {at}", hint)
    if not bool((weights > 0).any()):
        fail(ValueError, OP, "weights", expected, "only 0", hint)


def _balanced(share: Tensor, labels: Tensor) -> Tensor:
    """The same mass for every class that has any."""
    check_range(OP, "labels", labels, 0, 2**31)
    index = labels.unique(return_inverse=True)[1]
    mass = index.bincount(weights=share)
    return share / mass[index].clamp(min=torch.finfo(share.dtype).tiny)


def _orders(size: int, count: int, generator: torch.Generator) -> Tensor:
    """[count]: random orders of [0, size), one after the other."""
    rounds = -(-count // size)
    orders = [torch.randperm(size, generator=generator) for _ in range(rounds)]
    return torch.cat([*orders, torch.empty(0, dtype=torch.int64)])[:count]
