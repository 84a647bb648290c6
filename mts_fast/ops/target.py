"""The checks of a cross-entropy's target, for all ops that take one."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from mts_fast._check import (
    check_device,
    check_floating,
    check_integer,
    check_length,
    check_number,
    check_range,
    describe,
    fail,
)
from mts_fast.reference import Target


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
