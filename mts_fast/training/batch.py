"""What one call of MTSStep is given, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import (
    check_finite,
    check_flags,
    check_floating,
    check_integer,
    check_length,
    check_not_empty,
    check_range,
    check_tensor,
    describe,
    fail,
)
from mts_fast.hypergradient import LabelledBatch

OP = "MTSStep"


@dataclass(frozen=True)
class SelectorBatch:
    """A second, independent batch on which the selector learns (rows 6 to 8).

    inputs as the model takes them, labels [B2] (or [B2, T]); features [B2, F], is_synthetic [B2]
    and classes [B2] as for `MTSStep.__call__`.
    """

    inputs: Any
    labels: Tensor
    features: Tensor | None = None
    is_synthetic: Tensor | None = None
    classes: Tensor | None = None


@dataclass(frozen=True)
class CheckedBatch(LabelledBatch):
    """A batch after validation: everything there, on the labels' device."""

    features: Tensor | None  # [B, F]
    is_synthetic: Tensor  # bool [B]
    classes: Tensor  # int64 [B]


def check_batch(
    batch: SelectorBatch, num_classes: int | None, *, read: bool, prefix: str = ""
) -> CheckedBatch:
    """Validate one batch; `read` also looks at the values, which on a GPU waits for them."""
    labels = check_pair(batch.inputs, batch.labels, prefix)
    size = len(labels)
    features = batch.features
    if features is not None:
        check_floating(OP, f"{prefix}features", features, ndim=2)
        check_length(OP, f"{prefix}features", features, size)
        if read:
            check_finite(OP, f"{prefix}features", features)
    flags = batch.is_synthetic
    synthetic = (
        torch.zeros(size, dtype=torch.bool, device=labels.device)
        if flags is None
        else check_flags(OP, f"{prefix}is_synthetic", flags, size)
    )
    classes = batch.classes
    if classes is None:
        if labels.ndim != 1 or labels.is_floating_point():
            hint = "pass classes= (zeros where there are none)"
            fail(ValueError, OP, f"{prefix}labels", "class indices [B]", describe(labels), hint)
        classes = labels
    check_integer(OP, f"{prefix}classes", classes, ndim=1)
    check_length(OP, f"{prefix}classes", classes, size)
    if read and num_classes is not None:
        check_range(OP, f"{prefix}classes", classes, 0, num_classes, "see num_classes of Selector")
    return CheckedBatch(batch.inputs, labels, features, synthetic, classes.long())


def check_pair(inputs: Any, labels: object, prefix: str) -> Tensor:
    """Inputs and labels of the same, positive length; returns the labels."""
    tensor = check_tensor(OP, f"{prefix}labels", labels)
    check_not_empty(OP, f"{prefix}labels", tensor)
    leaves = LabelledBatch(inputs, tensor).tensors()
    if not leaves:
        expected = "a tensor, or a tuple or dict of tensors"
        fail(TypeError, OP, f"{prefix}inputs", expected, describe(inputs))
    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] != len(tensor):
            expected = f"of length {len(tensor)}, as {prefix}labels"
            hint = "the first axis is the batch"
            fail(ValueError, OP, f"{prefix}inputs", expected, describe(leaf), hint)
    return tensor
