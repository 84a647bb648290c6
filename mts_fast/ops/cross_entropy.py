"""cross_entropy and weighted_cross_entropy: contract, validation and dispatch."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import _len_torch_function_stack, handle_torch_function, has_torch_function

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
from mts_fast.backends.cpp import cross_entropy as cpp
from mts_fast.backends.registry import register, register_triton, resolve
from mts_fast.backends.triton import cross_entropy as triton
from mts_fast.reference import SampleStatistics, Target

# the variant of weighted_cross_entropy that also returns them
STATISTICS = "statistics"

register(
    "cross_entropy",
    "reference",
    lambda logits, target: reference.cross_entropy(logits, **target._asdict()),
)
register(
    "cross_entropy",
    "cpp",
    cpp.cross_entropy,
    cpp.reasons,
    wins=cpp.wins,
)
register_triton("cross_entropy", triton.cross_entropy, triton.reasons)
register_triton(
    "weighted_cross_entropy",
    triton.weighted_cross_entropy,
    triton.reasons,
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
    if is_overridden(logits):
        return handle_torch_function(
            cross_entropy,
            (logits,),
            *(logits, labels),
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    target = Target(labels, class_weight, label_smoothing, ignore_index)
    target = _checked("cross_entropy", logits, target)
    return resolve("cross_entropy", [logits])(logits, target)


def _composed(
    logits: Tensor, target: Target, p: Tensor, *, statistics: bool
) -> tuple[Tensor, Tensor, SampleStatistics | None]:
    """Unfused: the sum of p times cross_entropy. A fused implementation returns the same values."""
    losses = resolve("cross_entropy", [logits])(logits, target)
    columns = None
    if statistics:
        columns = reference.sample_statistics(
            logits, target.labels, ignore_index=target.ignore_index
        )
    return (p * losses).sum(), losses, columns


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
        (L [], l [B]), both differentiable, also in p. For sequences l_i is the mean over the
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

    Source: row 3, for loops of your own; `MTSStep` takes its losses from `cross_entropy`.

    Example:
        >>> import torch, mts_fast
        >>> logits, labels = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> loss, losses = mts_fast.weighted_cross_entropy(logits, labels, torch.tensor([0.5, 0.5]))
        >>> round(loss.item(), 4)
        1.3863
    """
    op = "weighted_cross_entropy"
    target = Target(labels, class_weight, label_smoothing, ignore_index)
    target = _checked(op, logits, target)
    check_floating(op, "p", p, ndim=1)
    check_length(op, "p", p, len(logits))
    check_device(op, "p", p, logits.device, "logits")
    run = resolve(op, [logits], STATISTICS if statistics else "")
    loss, losses, columns = run(logits, target, p, statistics=statistics)
    return (loss, losses) if columns is None else (loss, losses, columns)


def _checked(op: str, logits: Tensor, target: Target) -> Target:
    check_floating(op, "logits", logits)
    if logits.ndim not in (2, 3):
        hint = "put the classes last, and flatten the axes between"
        fail(ValueError, op, "logits", "[B, C] or [B, T, C]", tuple(logits.shape), hint)
    check_not_empty(op, "logits", logits)
    if logits.shape[-1] == 0:
        hint = "look at the last layer's width"
        fail(ValueError, op, "logits", "of at least one class", tuple(logits.shape), hint)
    return check_target(op, target, logits, "logits", logits.shape[-1])


def is_overridden(*tensors: Tensor) -> bool:
    """Whether a mode or a subclass of Tensor is to see the op as one call (`torch.overrides`)."""
    if torch.compiler.is_compiling():
        return False
    return has_torch_function(tensors) or bool(_len_torch_function_stack())


def check_target(op: str, target: Target, rows: Tensor, like: str, classes: int) -> Target:
    """The target with int64 labels; raise where it does not fit `rows` [B, *] or [B, T, *], named
    `like`, and C classes."""
    labels, class_weight = target.labels, target.class_weight
    check_integer(op, "labels", labels)
    check_device(op, "labels", labels, rows.device, like)
    if labels.shape != rows.shape[:-1]:
        expected = f"of shape {tuple(rows.shape[:-1])}"
        hint = f"one class number for each row of {like}"
        fail(ValueError, op, "labels", expected, tuple(labels.shape), hint)
    check_number(op, "label_smoothing", target.label_smoothing, at_least=0, at_most=1)
    _check_ignore_index(op, target.ignore_index)
    if class_weight is not None:
        check_floating(op, "class_weight", class_weight, ndim=1)
        check_length(op, "class_weight", class_weight, classes)
        check_device(op, "class_weight", class_weight, rows.device, like)
    # before labels are compared: -100 as an unsigned 8-bit integer would be class 156
    labels = labels.long()
    if not labels.is_cuda and not torch.compiler.is_compiling():
        counted = labels[labels != target.ignore_index]
        check_range(op, "labels", counted, 0, classes, f"the logits have {classes} classes")
    return target._replace(labels=labels)


def _check_ignore_index(op: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        hint = "pass a whole number, such as torch's -100"
        fail(TypeError, op, "ignore_index", "an int", describe(value), hint)
    if not -(2**63) <= int(value) < 2**63:
        fail(ValueError, op, "ignore_index", "an int of 64 bits", value, "pass torch's -100")
