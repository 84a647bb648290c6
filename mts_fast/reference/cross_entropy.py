"""Row 3: per-sample and weighted cross-entropy, for [B, C] logits and [B, T, C] sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.reference.target import Target


class SampleStatistics(NamedTuple):
    """What the logits say of each sample [B]; of a sequence, the mean over its counted positions.

    Float32 (float64 of float64); 0 where nothing counts. Without derivatives.
    """

    error_norm: Tensor  # EL2N: Euclidean norm of softmax - one_hot(label)
    correct: Tensor  # 1 where the label has the largest logit (the first of several), else 0
    entropy: Tensor  # of the softmax, in nats


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-sample cross-entropy [B] of logits [B, C] and labels [B].

    For sequences (logits [B, T, C], labels [B, T]) the loss of a sample is the mean over its
    positions that are not ignored. A sample with nothing but ignored labels has loss 0.
    """
    if class_weight is not None and not torch.is_autocast_enabled(logits.device.type):
        class_weight = class_weight.to(logits.dtype)  # autocast computes both in float32
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction="none",
    ).view(labels.shape)
    return Target(labels, ignore_index=ignore_index).mean_of_positions(losses)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(L, l): L = sum_i p_i l_i [] and the per-sample losses l [B]."""
    losses = cross_entropy(
        logits,
        labels,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    return (p * losses).sum(), losses


@torch.no_grad()
def sample_statistics(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> SampleStatistics:
    """Error norm, correctness and entropy of samples with logits [B, C] or [B, T, C]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    probability = logits.to(dtype).softmax(-1)
    counted = labels != ignore_index
    one_hot = F.one_hot(labels.masked_fill(~counted, 0), logits.shape[-1])
    rows = (
        (probability - one_hot).norm(dim=-1),
        (logits.argmax(-1) == labels).to(dtype),
        torch.special.entr(probability).sum(-1),
    )
    target = Target(labels, ignore_index=ignore_index)
    columns = (target.mean_of_positions(row.masked_fill(~counted, 0.0)) for row in rows)
    return SampleStatistics(*columns)
