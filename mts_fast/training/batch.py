"""The batches of one call of MTSStep, validated once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from mts_fast._check import (
    check_device,
    check_finite,
    check_flags,
    check_floating,
    check_integer,
    check_length,
    check_not_empty,
    check_range,
    check_readable,
    check_tensor,
    describe,
    fail,
)
from mts_fast.distributed import Ranks, Shard
from mts_fast.hypergradient import LabelledBatch
from mts_fast.hypergradient.objective import IGNORED

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
class SelectorRows:
    """What a selector reads beside the features, of the samples of all ranks."""

    classes: Tensor  # int64 [B]
    is_synthetic: Tensor  # bool [B]

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class CheckedBatch(LabelledBatch):
    """A batch after validation, on the labels' device; only `features` may be missing."""

    features: Tensor | None  # [B, F]
    is_synthetic: Tensor  # bool [B]
    classes: Tensor  # int64 [B]
    shard: Shard = field(default=Shard(), kw_only=True)  # of the ranks' joined batch


@dataclass(frozen=True)
class CheckedValidation(LabelledBatch):
    """The validation batch after validation; weights and groups are those of all ranks."""

    weights: Tensor | None  # [V], >= 0
    groups: Tensor | None  # int64 [V], numbered from 0 without gaps
    shard: Shard = field(default=Shard(), kw_only=True)


def check_batch(
    batch: SelectorBatch,
    num_classes: int | None,
    *,
    check_values: bool,
    prefix: str = "",
    may_be_empty: bool = False,
) -> CheckedBatch:
    """Validate one batch; `check_values` also reads the values, which waits for a GPU."""
    if not isinstance(batch, SelectorBatch):
        hint = "make it with mts_fast.SelectorBatch(inputs, labels, ...)"
        fail(TypeError, OP, prefix.rstrip("."), "a SelectorBatch", describe(batch), hint)
    labels = check_pair(batch.inputs, batch.labels, prefix, may_be_empty=may_be_empty)
    size = len(labels)
    features = batch.features
    if features is not None:
        check_floating(OP, f"{prefix}features", features, ndim=2)
        check_length(OP, f"{prefix}features", features, size)
        check_device(OP, f"{prefix}features", features, labels.device, f"{prefix}labels")
        if check_values:
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
            hint = (
                "pass labels.long(); for labels that are no class indices pass classes= (zeros"
                " where there are none) and, but for sequences of them, loss="
            )
            fail(ValueError, OP, f"{prefix}labels", "class indices [B]", describe(labels), hint)
        classes = labels
        arg = f"{prefix}labels"
    else:
        arg = f"{prefix}classes"
    check_integer(OP, arg, classes, ndim=1)
    check_length(OP, arg, classes, size)
    check_device(OP, arg, classes, labels.device, f"{prefix}labels")
    if check_values:
        hint = "number the classes from 0; see num_classes of Selector, and class_weight"
        if arg.endswith("labels"):
            hint += "; where labels are not the selector's classes, pass classes="
        most = num_classes if num_classes is not None else torch.iinfo(torch.int64).max
        check_range(OP, arg, classes, 0, most, hint)
    name = f"{prefix}labels"
    return CheckedBatch(batch.inputs, labels, features, synthetic, classes.long(), name=name)


def check_validation(
    inputs: Any,
    labels: object,
    weights: object,
    groups: object,
    *,
    needs_groups: bool,
    custom_loss: bool,
    check_values: bool,
    may_be_empty: bool = False,
) -> CheckedValidation:
    """Validate the validation batch; `custom_loss`: a function of the user's takes the labels."""
    tensor = check_pair(inputs, labels, "val_", may_be_empty=may_be_empty)
    check_values = check_values and len(tensor) > 0
    if not custom_loss:
        check_integer(OP, "val_labels", tensor)
    if weights is not None:
        weights = check_floating(OP, "val_weights", weights, ndim=1)
        check_length(OP, "val_weights", weights, len(tensor))
        check_device(OP, "val_weights", weights, tensor.device, "val_labels")
        if check_values:
            check_finite(OP, "val_weights", weights)
            if bool((weights < 0).any()):
                _refuse_weights(weights)
    if needs_groups and groups is None:
        hint = "pass the group of each validation sample"
        fail(ValueError, OP, "val_groups", "given with this val_objective", "none", hint)
    if groups is not None:
        numbers = check_integer(OP, "val_groups", groups, ndim=1)
        check_length(OP, "val_groups", numbers, len(tensor))
        check_device(OP, "val_groups", numbers, tensor.device, "val_labels")
        groups = numbers.long() if needs_groups else None
    return CheckedValidation(inputs, tensor, weights, groups, name="val_labels")


def _refuse_weights(weights: Tensor) -> NoReturn:
    got = f"values from {float(weights.min()):g} to {float(weights.max()):g}"
    expected = "0 or more, and positive somewhere"
    fail(ValueError, OP, "val_weights", expected, got, "they are shares of the loss")


def counting_samples(batch: CheckedValidation, *, custom_loss: bool, check_values: bool) -> int:
    """How many samples have a label that counts; all of them where labels are not looked at."""
    if custom_loss or not check_values:
        return len(batch)
    return int((batch.labels != IGNORED).unsqueeze(-1).flatten(1).any(1).sum())


def joined(
    ranks: Ranks, batch: CheckedValidation, shard: Shard, counting: Shard, *, check_values: bool
) -> CheckedValidation:
    """The validation batch with the weights and group numbers of all ranks; `counting` are the
    samples of `counting_samples`. Something has to count on one rank, not on each."""
    if counting.total == 0:
        hint = "give at least one sample a class"
        got = f"{IGNORED} for every sample"
        fail(ValueError, OP, "val_labels", "classes that count something", got, hint)
    weights, groups = batch.weights, batch.groups
    present = [t for t in (weights, groups) if t is not None]
    if present:
        rows = iter(ranks.rows("val_weights and val_groups", shard, lambda: present))
        weights = None if weights is None else next(rows)
        if weights is not None and check_values and not bool((weights > 0).any()):
            _refuse_weights(weights)
        groups = None if groups is None else next(rows).unique(return_inverse=True)[1]
    return replace(batch, weights=weights, groups=groups, shard=shard)


def check_pair(inputs: Any, labels: object, prefix: str, *, may_be_empty: bool = False) -> Tensor:
    """Inputs and labels of the same length, positive but on one of several ranks; returns the
    labels."""
    tensor = check_tensor(OP, f"{prefix}labels", labels)
    if not may_be_empty or not tensor.ndim:
        check_not_empty(OP, f"{prefix}labels", tensor)
    check_readable(OP, f"{prefix}labels", tensor)
    leaves = LabelledBatch(inputs, tensor).tensors()
    if not leaves:
        expected = "a tensor, or a tuple or dict of tensors"
        hint = "convert it with torch.as_tensor"
        fail(TypeError, OP, f"{prefix}inputs", expected, describe(inputs), hint)
    for leaf in leaves:
        if leaf.ndim and leaf.shape[0] != len(tensor):
            expected = f"of length {len(tensor)}, as {prefix}labels"
            hint = "the first axis is the batch"
            fail(ValueError, OP, f"{prefix}inputs", expected, describe(leaf), hint)
    return tensor
