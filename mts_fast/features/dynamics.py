"""Training-dynamics features: scores of a pool under a fixed classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import (
    INTEGER_DTYPES,
    check_bool,
    check_callable,
    check_device,
    check_finite,
    check_integer,
    check_length,
    check_module,
    check_not_empty,
    check_positive_int,
    check_range,
    check_readable,
    check_tensor,
    describe,
    fail,
)
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.hypergradient import GradientNorm, LabelledBatch, Loss, Objective
from mts_fast.hypergradient.objective import IGNORED

OP = "training_dynamics"


def training_dynamics(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    loss: Loss | None = None,
    batch_size: int = 256,
    gradient_norm: bool = True,
) -> dict[str, Tensor]:
    """Loss, gradient norm and error norm of every sample, the model in eval mode.

    Args:
        model: a classifier, trained without selection, whose output is logits [B, C] or [B, T, C],
            or has them as `.logits` or `["logits"]`.
        inputs: [N, ...]; or a tuple (`model(*inputs)`) or a dict (`model(**inputs)`) of tensors
            [N, ...].
        labels: [N], integers in [0, C); or [N, T], where -100 marks positions that do not count,
            but not all of a sample's. With `loss`, what it takes.
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits without.
        batch_size: samples per pass.
        gradient_norm: leave out the costly column with False.

    Returns:
        columns by name, each [N, 1]: loss, gradient_norm (Euclidean norm of the gradient by all
        trainable parameters), error_norm (EL2N: norm of softmax - one-hot; with `loss` only where
        the output has logits that the labels are classes of).

    Raises:
        TypeError, ValueError: wrong shapes, an empty pool, labels out of range, an output without
            logits, no trainable parameters, NaN losses or gradients (with the rows).
        RuntimeError: gradient norms under torch.inference_mode, which has no gradients.

    Notes:
        Modes, buffers and random generators of the model and the loss are left as they were, and
        it does not matter whether gradients are enabled. Gradient norms cost one forward and one
        backward where the ghost engine serves the model (`explain_engine`); else one backward a
        sample.

    Source: docs/algorithm.md, features: training dynamics; Paul et al. 2021 for EL2N.

    Example:
        >>> import torch, mts_fast
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> scores = mts_fast.features.training_dynamics(torch.nn.Linear(4, 3), x, y)
        >>> sorted(scores)
        ['error_norm', 'gradient_norm', 'loss']
    """
    check_module(OP, "model", model)
    if loss is not None:
        check_callable(OP, "loss", loss)
    check_positive_int(OP, "batch_size", batch_size)
    check_bool(OP, "gradient_norm", gradient_norm)
    pool = _checked_pool(inputs, labels, classes=loss is None)
    if gradient_norm:
        _check_gradients(model, pool)
    objective = Objective(model, loss, op=OP)
    world, scorer = objective.world, _Scorer(objective, pool.labels, gradient_norm)
    with training_mode(world, False), preserved_buffers(world), preserved_rng(world):
        parts = [scorer(batch) for batch in pool.split(batch_size)]
    columns = {name: torch.cat([part[name] for part in parts])[:, None] for name in parts[0]}
    for name, column in columns.items():
        hint = "the model or these inputs are broken"
        check_finite(OP, f"{name} of every sample", column, hint)
    return columns


def _checked_pool(inputs: Any, labels: object, *, classes: bool) -> LabelledBatch:
    """The pool, of tensors that fit one another; labels are classes or whatever a loss takes."""
    targets = check_tensor(OP, "labels", labels)
    leaves = LabelledBatch(inputs, targets).tensors()
    if not leaves:
        expected = "a tensor, or a tuple, list or dict of tensors"
        fail(TypeError, OP, "inputs", expected, describe(inputs), "use torch.as_tensor")
    for leaf in leaves:
        if leaf.layout != torch.strided:
            got = f"one of layout {leaf.layout}"
            fail(TypeError, OP, "inputs", "dense tensors", got, "call .to_dense() on it")
        check_readable(OP, "inputs", leaf)
        check_not_empty(OP, "inputs", leaf)
    check_not_empty(OP, "labels", targets)
    for leaf in leaves:
        check_length(OP, "labels", targets, len(leaf))
        check_device(OP, "labels", targets, leaf.device, "inputs")
    if not classes:
        return LabelledBatch(inputs, targets)
    check_integer(OP, "labels", targets)
    if targets.ndim > 2:
        hint = "pass loss= for other targets"
        fail(ValueError, OP, "labels", "[N] or [N, T]", tuple(targets.shape), hint)
    targets = targets.long()
    if targets.ndim == 2:
        ignored = (targets == IGNORED).all(1).nonzero().flatten().tolist()
        if ignored:
            expected = "such that every sample has one that counts"
            fail(
                ValueError, OP, "labels", expected, f"none in rows {ignored[:5]}", "drop these rows"
            )
    return LabelledBatch(inputs, targets)


def _check_gradients(model: nn.Module, pool: LabelledBatch) -> None:
    """Whether there can be gradients at all."""
    if not any(p.requires_grad for p in model.parameters()):
        hint = "set requires_grad, or pass gradient_norm=False"
        fail(ValueError, OP, "model", "given trainable parameters", "none", hint)
    if torch.is_inference_mode_enabled():
        hint = "call it outside, or pass gradient_norm=False"
        fail(RuntimeError, OP, "gradient_norm", "False in torch.inference_mode()", "True", hint)
    if any(t.is_inference() for t in [*pool.tensors(), pool.labels]):
        got = "tensors made in torch.inference_mode()"
        fail(ValueError, OP, "inputs", "tensors that gradients can go through", got, "clone them")


class _Scorer:
    """Scores of one batch after the other."""

    def __init__(self, objective: Objective, labels: Tensor, gradient_norm: bool) -> None:
        self.objective = objective
        self.norms = GradientNorm(objective) if gradient_norm else None
        self.labels = labels  # of the whole pool
        self.has_error_norm: bool | None = None  # until the first output was seen

    def __call__(self, batch: LabelledBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            output = self.objective.forward(batch.inputs)
            logits = self._logits(output, batch)
            scores = {}
            if logits is not None:
                ones = torch.ones(len(batch), dtype=logits.dtype, device=logits.device)
                _, scores["loss"], statistics = ops.weighted_cross_entropy(
                    logits, batch.labels, ones, statistics=True
                )
                scores["error_norm"] = statistics.error_norm
            if self.objective.loss is not None:
                scores["loss"] = self.objective.losses_of(output, batch.labels)
        if self.norms is not None:
            with torch.enable_grad():
                scores["gradient_norm"] = self.norms(batch).detach()
        return scores

    def _logits(self, output: Any, batch: LabelledBatch) -> Any:
        """Logits of which the labels are class indices; None where they are not, which is allowed
        with a caller's loss."""
        try:
            logits = self.objective.logits_of(output)
        except TypeError:
            if self.objective.loss is None:
                raise
            return None
        if logits.shape[:-1] != batch.labels.shape:
            if self.objective.loss is not None:
                return None
            expected = f"[{', '.join(map(str, batch.labels.shape))}, C]"
            hint = "return logits of every sample, classes last"
            fail(ValueError, OP, "the model's output", expected, tuple(logits.shape), hint)
        if self.has_error_norm is None:
            self.has_error_norm = self._are_classes(logits.shape[-1])
        return logits if self.has_error_norm else None

    def _are_classes(self, classes: int) -> bool:
        """Whether all labels are classes; with a caller's loss they may be something else."""
        labels = self.labels
        if self.objective.loss is None:
            counted = labels[labels != IGNORED] if labels.ndim == 2 else labels
            hint = f"the model's output has {classes} classes"
            check_range(OP, "labels", counted, 0, classes, hint)
            return True
        return labels.dtype in INTEGER_DTYPES and bool(((labels >= 0) & (labels < classes)).all())
