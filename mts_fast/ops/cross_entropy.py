"""cross_entropy and weighted_cross_entropy: contract, validation and dispatch."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_device,
    check_floating,
    check_integer,
    check_length,
    check_not_empty,
    check_number,
    check_range,
    describe,
    fail,
)
from mts_fast._triton import kernel_devices
from mts_fast.ops import cross_entropy_cpp, cross_entropy_triton
from mts_fast.ops.registry import register, resolve, unmeasured
from mts_fast.reference import SampleStatistics

register("cross_entropy", "reference", reference.cross_entropy)
register(
    "cross_entropy",
    "cpp",
    cross_entropy_cpp.cross_entropy,
    cross_entropy_cpp.reasons,
    wins=cross_entropy_cpp.wins,
)
for _op, _function in (
    ("cross_entropy", cross_entropy_triton.cross_entropy),
    ("weighted_cross_entropy", cross_entropy_triton.weighted_cross_entropy),
):
    register(
        _op,
        "triton",
        _function,
        cross_entropy_triton.reasons,
        devices=kernel_devices(),
        wins=unmeasured,
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
    return resolve("cross_entropy", [logits])(
        logits,
        labels.long(),
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def _composed(
    logits: Tensor, labels: Tensor, p: Tensor, *, statistics: bool, **options: Any
) -> tuple[Tensor, Tensor, SampleStatistics | None]:
    """By whichever cross_entropy serves: what a fused one has to equal."""
    losses = resolve("cross_entropy", [logits])(logits, labels, **options)
    found = None
    if statistics:
        found = reference.sample_statistics(logits, labels, ignore_index=options["ignore_index"])
    return (p * losses).sum(), losses, found


register("weighted_cross_entropy", "reference", _composed)


@overload
def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    statistics: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    statistics: Literal[True],
) -> tuple[Tensor, Tensor, SampleStatistics]: ...


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    p: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, SampleStatistics]:
    """Cross-entropy of a batch in which sample i counts p_i.

    L = sum_i p_i l_i, l_i = -log softmax(logits_i)[label_i].

    Args:
        logits: [B, C], or [B, T, C] for sequences; floating point.
        labels: [B], or [B, T]; integers in [0, C) or `ignore_index`.
        p: [B], weight of each sample (of each sequence); floating point.
        class_weight: [C], factor of each class as in torch's cross_entropy; in any floating dtype.
        label_smoothing: in [0, 1], share of the uniform distribution in the target.
        ignore_index: label that counts nothing.
        statistics: return a third value, `SampleStatistics` (without derivatives): error norm
            (EL2N: norm of softmax - one-hot), correct (1 where the label has the largest logit,
            ties to the lowest class) and entropy (nats) of each sample, each [B]; of a sequence,
            the mean over its counted positions.

    Returns:
        (L [], l [B]), both differentiable, by p, too. For sequences l_i is the mean over the
        positions of sequence i that are not ignored; where all are ignored it is 0.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, an empty batch, tensors on several devices, label_smoothing
            outside [0, 1], labels out of range (checked on the CPU; on a GPU the check would wait
            for the device: there the Triton kernel gives such a sample a loss of NaN).

    Notes:
        From 1000 classes on, float32 on the CPU runs in C++, without a matrix of log-probabilities;
        losses and gradients then differ from torch's in the last place. The Triton kernel
        (`use_backend("triton")`) reads the logits once, in any strides, for the losses, the
        statistics and the gradient of L; it accumulates in float32 (float64 of float64) and is
        deterministic. Rows of more than 8192 classes are read twice.

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
    check_device(op, "p", p, logits.device, "logits")
    loss, losses, found = resolve(op, [logits])(
        logits,
        labels.long(),
        p,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        statistics=statistics,
    )
    return (loss, losses) if found is None else (loss, losses, found)


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
        hint = "put the classes last, and flatten the axes between"
        fail(ValueError, op, "logits", "[B, C] or [B, T, C]", tuple(logits.shape), hint)
    check_not_empty(op, "logits", logits)
    if logits.shape[-1] == 0:
        hint = "look at the last layer's width"
        fail(ValueError, op, "logits", "of at least one class", tuple(logits.shape), hint)
    targets = Targets(labels, class_weight, label_smoothing, ignore_index)
    targets.check(op, logits, "logits", logits.shape[-1])


class Targets(NamedTuple):
    """What a cross-entropy compares with, as its caller passed it."""

    labels: Tensor
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int

    def check(self, op: str, rows: Tensor, like: str, classes: int) -> None:
        """Raise where they do not fit `rows` [B, *] or [B, T, *] (named `like`) and C classes."""
        labels, class_weight = self.labels, self.class_weight
        check_integer(op, "labels", labels)
        check_device(op, "labels", labels, rows.device, like)
        if labels.shape != rows.shape[:-1]:
            expected = f"of shape {tuple(rows.shape[:-1])}"
            hint = f"one class number for each row of {like}"
            fail(ValueError, op, "labels", expected, tuple(labels.shape), hint)
        check_number(op, "label_smoothing", self.label_smoothing, at_least=0, at_most=1)
        _check_ignore_index(op, self.ignore_index)
        if class_weight is not None:
            check_floating(op, "class_weight", class_weight, ndim=1)
            check_length(op, "class_weight", class_weight, classes)
            check_device(op, "class_weight", class_weight, rows.device, like)
        if not labels.is_cuda and not torch.compiler.is_compiling():
            # in 8 bits without a sign, -100 would be class 156
            labels = labels.long()
            used = labels[labels != self.ignore_index]
            check_range(op, "labels", used, 0, classes, f"the logits have {classes} classes")


def _check_ignore_index(op: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        hint = "pass a whole number, such as torch's -100"
        fail(TypeError, op, "ignore_index", "an int", describe(value), hint)
    if not -(2**63) <= int(value) < 2**63:
        fail(ValueError, op, "ignore_index", "an int of 64 bits", value, "pass torch's -100")
