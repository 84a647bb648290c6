"""Rows 1, 2 and 7: sample weights, their global normalisation, and the selector's cotangent.

Everything is in log space. w / sum(w) in float32 becomes 0/0 when the selector saturates; a
softmax over log w does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_weights(logits: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """Row 1 in log space: log w_i = logsigmoid(z_i) + log class_weight_i.

    logits [B] are the selector's outputs z; class_weight [B] is already gathered by label.
    """
    log_w = F.logsigmoid(logits)
    return log_w if class_weight is None else log_w + class_weight.log()


def normalize_weights(log_w: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Row 2: p_i = w_i / S with log S = logsumexp over the global batch.

    log_w [B]; log_total [] is log S where the batch is only a part of the global one (in float64:
    its rounding is relative to |log S|). Where every weight is zero (log S = -inf), p is zero
    everywhere: no sample counts.
    """
    if log_total is None:
        # softmax subtracts the largest log w first: log S itself would round log w of -1e4 to 1e-3
        vanished = torch.isneginf(log_w).all()
        return log_w.masked_fill(vanished, 0.0).softmax(0).masked_fill(vanished, 0.0)
    vanished = torch.isneginf(log_total)
    # a 0-d float64 tensor does not promote the difference: torch keeps the vector's dtype
    widened = log_w.to(torch.promote_types(log_w.dtype, log_total.dtype))
    p = (widened - log_total.masked_fill(vanished, 0.0)).exp().to(log_w.dtype)
    return p.masked_fill(vanished, 0.0)


def selector_gradient(
    dots: Tensor, logits: Tensor, p: Tensor, mean_dot: Tensor | None = None
) -> Tensor:
    """Row 7 carried one step further, to the selector's logits: dL_val/dz_j.

    dL_val/dlog w_j = w_j * dL_val/dw_j = -p_j (d_j - sum_i p_i d_i), and dlog w/dz = sigmoid(-z),
    which needs no division by S. dots, logits, p: [B]; mean_dot [] is the global sum p_i d_i.
    """
    if mean_dot is None:
        mean_dot = (p * dots).sum()
    return p * (mean_dot - dots) * torch.sigmoid(-logits)
