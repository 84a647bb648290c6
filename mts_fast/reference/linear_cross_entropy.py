"""Row 3 where classes are many: cross-entropy of hidden @ weight^T + bias, and its tangent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.reference.cross_entropy import cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Per-sample losses [B] of the logits F.linear(hidden, weight, bias).

    hidden [B, D] or [B, T, D], weight [C, D], bias [C], labels [B] or [B, T].
    """
    return cross_entropy(
        F.linear(hidden, weight, bias),
        labels,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )


def linear_cross_entropy_tangent(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """How fast each loss [B] grows when weight and bias move along their tangents."""

    def losses(logits: Tensor) -> Tensor:
        return cross_entropy(
            logits,
            labels,
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )

    tangent = torch.zeros_like(weight) if weight_tangent is None else weight_tangent
    logits_tangent = F.linear(hidden, tangent, bias_tangent)
    return torch.func.jvp(losses, (F.linear(hidden, weight, bias),), (logits_tangent,))[1]
