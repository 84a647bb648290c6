"""cross_entropy and weighted_cross_entropy: contract, validation and dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_floating,
    check_integer,
    check_length,
    check_not_empty,
    check_range,
    fail,
)
from mts_fast.ops import cross_entropy_cpp
from mts_fast.ops.registry import register, resolve

register("cross_entropy", "reference", reference.cross_entropy)
register(
    "cross_entropy",
    "cpp",
    cross_entropy_cpp.cross_entropy,
    cross_entropy_cpp.reasons,
    wins=cross_entropy_cpp.wins,
)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-sample cross-entropy l_i [B]; arguments and errors as `weighted_cross_entropy`."""
    _check("cross_entropy", logits, labels, class_weight, label_smoothing, ignore_index)
    return _function(logits)(
        logits,
        labels.long(),
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a batch in which sample i counts p_i.

    L = sum_i p_i l_i, l_i = -log softmax(logits_i)[label_i].

    Args:
        logits: [B, C], or [B, T, C] for sequences; floating point.
        labels: [B], or [B, T]; integers in [0, C) or `ignore_index`.
        p: [B], weight of each sample (of each sequence); floating point.
        class_weight: [C], factor of each class as in torch's cross_entropy.
        label_smoothing: in [0, 1], share of the uniform distribution in the target.
        ignore_index: label that counts nothing.

    Returns:
        (L [], l [B]), both differentiable. For sequences l_i is the mean over the positions of
        sequence i that are not ignored; where all are ignored it is 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, an empty batch, label_smoothing outside [0, 1], labels out of
            range (checked on the CPU; on a GPU the check would wait for the device).

    Notes:
        From 1000 classes on, float32 on the CPU runs in C++, without a matrix of log-probabilities;
        losses and gradients then differ from torch's in the last place.

    Source: row 3.

    Example:
        >>> import torch, mts_fast
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> loss, losses = mts_fast.weighted_cross_entropy(logits, labels, torch.tensor([0.5, 0.5]))
        >>> round(loss.item(), 4)
        1.3863
    """
    op = "weighted_cross_entropy"
    _check(op, logits, labels, class_weight, label_smoothing, ignore_index)
    check_floating(op, "p", p, ndim=1)
    check_length(op, "p", p, len(logits))
    losses = _function(logits)(
        logits,
        labels.long(),
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    return (p * losses).sum(), losses


def _function(logits: Tensor) -> Callable[..., Tensor]:
    """torch.compile fuses for itself, and cannot look into the choice of a backend."""
    if torch.compiler.is_compiling():
        return reference.cross_entropy
    return resolve("cross_entropy", [logits])


def _check(
    op: str,
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    check_floating(op, "logits", logits)
    if logits.ndim not in (2, 3):
        fail(ValueError, op, "logits", "[B, C] or [B, T, C]", tuple(logits.shape))
    check_not_empty(op, "logits", logits)
    check_integer(op, "labels", labels)
    if labels.shape != logits.shape[:-1]:
        fail(ValueError, op, "labels", f"of shape {tuple(logits.shape[:-1])}", tuple(labels.shape))
    if not 0.0 <= label_smoothing <= 1.0:
        fail(ValueError, op, "label_smoothing", "in [0, 1]", label_smoothing)
    classes = logits.shape[-1]
    if class_weight is not None:
        check_floating(op, "class_weight", class_weight, ndim=1)
        check_length(op, "class_weight", class_weight, classes)
    if not labels.is_cuda and not torch.compiler.is_compiling():
        used = labels[labels != ignore_index]
        check_range(op, "labels", used, 0, classes, f"the logits have {classes} classes")
