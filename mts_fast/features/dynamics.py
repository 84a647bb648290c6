"""Training-dynamics features: scores of a pool under a fixed classifier, and forgetting counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import (
    check_finite,
    check_integer,
    check_length,
    check_not_empty,
    check_positive_int,
    check_range,
    check_tensor,
    fail,
)
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.hypergradient import GradientNorm, LabelledBatch

OP = "training_dynamics"


def training_dynamics(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    gradient_norm: bool = True,
) -> dict[str, Tensor]:
    """Loss, gradient norm and error norm of every sample, the model in eval mode.

    Args:
        model: a classifier with logits [B, C], trained without selection.
        inputs: [N, ...].
        labels: [N], integers in [0, C).
        batch_size: samples per pass.
        gradient_norm: leave out the costly column with False.

    Returns:
        columns by name, each [N, 1]: loss, gradient_norm (Euclidean norm of the gradient by all
        trainable parameters), error_norm (EL2N: norm of softmax - one-hot).

    Raises:
        TypeError, ValueError: wrong shapes, an empty pool, labels out of range, no trainable
            parameters, NaN losses (with the rows).

    Notes:
        Mode, buffers and random generators of the model are left as they were. Gradient norms cost
        one forward and one backward where the ghost engine serves the model (`explain_engine`);
        else one backward a sample.

    Source: feature table, training dynamics; Paul et al. 2021 for EL2N.

    Example:
        >>> import torch, mts_fast
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> scores = mts_fast.features.training_dynamics(torch.nn.Linear(4, 3), x, y)
        >>> sorted(scores)
        ['error_norm', 'gradient_norm', 'loss']
    """
    check_tensor(OP, "inputs", inputs)
    check_not_empty(OP, "inputs", inputs)
    check_integer(OP, "labels", labels, ndim=1)
    check_length(OP, "labels", labels, len(inputs))
    check_positive_int(OP, "batch_size", batch_size)
    if gradient_norm and not any(p.requires_grad for p in model.parameters()):
        fail(ValueError, OP, "model", "given trainable parameters", "none", "set requires_grad")
    parts: list[dict[str, Tensor]] = []
    norms = GradientNorm(model) if gradient_norm else None
    with training_mode(model, False), preserved_buffers(model), preserved_rng(model):
        for x, y in zip(inputs.split(batch_size), labels.long().split(batch_size), strict=True):
            parts.append(_scores(model, x, y, norms))
    columns = {name: torch.cat([part[name] for part in parts])[:, None] for name in parts[0]}
    check_finite(
        OP, "loss of every sample", columns["loss"], "the model or these inputs are broken"
    )
    return columns


def _scores(
    model: nn.Module, x: Tensor, y: Tensor, norms: GradientNorm | None
) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = model(x)
        alike = torch.ones(len(y), dtype=logits.dtype, device=y.device)
        _, losses, found = ops.weighted_cross_entropy(logits, y, alike, statistics=True)
    scores = {"loss": losses, "error_norm": found.error_norm}
    if norms is not None:
        scores["gradient_norm"] = norms(LabelledBatch(x, y))
    return scores


class ForgettingCounter:
    """Counts, over epochs, how often a sample was classified rightly and then wrongly.

    Call `update` with any part of the pool whenever it is predicted; each sample is compared with
    its own last prediction.

    Example:
        >>> import torch, mts_fast
        >>> counter = mts_fast.features.ForgettingCounter(2)
        >>> for guess in ([1, 0], [0, 0], [1, 0]):
        ...     counter.update(torch.arange(2), torch.tensor(guess) == 1)
        >>> counter.counts.tolist(), counter.never_correct.tolist()
        ([1, 0], [False, True])
    """

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        check_positive_int("ForgettingCounter", "num_samples", num_samples)
        self.counts = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._last = torch.zeros(num_samples, dtype=torch.bool, device=device)
        self._ever = torch.zeros(num_samples, dtype=torch.bool, device=device)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Record predictions: indices [B] of the samples (each once), correct [B] bool.

        Raises:
            TypeError, ValueError: wrong dtypes or shapes, indices out of range or repeated.
        """
        op = "ForgettingCounter.update"
        check_integer(op, "indices", indices, ndim=1)
        check_tensor(op, "correct", correct, ndim=1)
        check_length(op, "correct", correct, len(indices))
        if not indices.is_cuda:
            check_range(op, "indices", indices, 0, len(self.counts))
            if len(indices.unique()) != len(indices):
                fail(
                    ValueError, op, "indices", "distinct", "repeated ones", "update once per epoch"
                )
        indices, correct = indices.long(), correct.bool()
        self.counts[indices] += self._last[indices] & ~correct
        self._last[indices] = correct
        self._ever[indices] |= correct

    @property
    def never_correct(self) -> Tensor:
        """[N] bool: samples that were wrong at every update (or never seen)."""
        return ~self._ever

    def columns(self) -> dict[str, Tensor]:
        """forgetting_counts and never_correct as float columns [N, 1] for a FeatureTable."""
        return {
            "forgetting_counts": self.counts[:, None].float(),
            "never_correct": self.never_correct[:, None].float(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts and last predictions."""
        return {
            "counts": self.counts.clone(),
            "last": self._last.clone(),
            "ever": self._ever.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counts and last predictions of a counter of the same size."""
        if len(state["counts"]) != len(self.counts):
            expected, got = f"of {len(self.counts)} samples", len(state["counts"])
            fail(ValueError, "ForgettingCounter.load_state_dict", "state", expected, got)
        self.counts = state["counts"].clone()
        self._last = state["last"].clone()
        self._ever = state["ever"].clone()
