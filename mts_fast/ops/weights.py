"""normalize_weights and selector_gradient: from the selector's logits to p, and back."""

from __future__ import annotations

from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_floating, check_length, check_not_empty, fail


def normalize_weights(
    logits: Tensor, *, class_weight: Tensor | None = None, log_total: Tensor | None = None
) -> Tensor:
    """Turn the selector's logits into sample weights that sum to 1 over the global batch.

    p_i = w_i / S with w_i = sigmoid(z_i) * class_weight_i and S = sum_j w_j.

    Args:
        logits: z [B], floating point.
        class_weight: [B], the weight of each sample's class, already gathered; >= 0.
        log_total: [], log S where this batch is a part of a larger one (micro-batches, ranks).

    Returns:
        p [B], differentiable in logits.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong shapes, or an empty batch.

    Notes:
        Computed as a softmax over log w, so saturated logits (|z| of 1e4) give exact ratios. Where
        every weight is zero (all class weights 0), p is zero everywhere.

    Source: DESIGN rows 1 and 2; the paper's equation for the normalised sample weight.

    Example:
        >>> import torch, mts_fast
        >>> mts_fast.normalize_weights(torch.tensor([-1e4, -1e4])).tolist()
        [0.5, 0.5]
    """
    op = "normalize_weights"
    check_floating(op, "logits", logits, ndim=1)
    check_not_empty(op, "logits", logits)
    if class_weight is not None:
        check_floating(op, "class_weight", class_weight, ndim=1)
        check_length(op, "class_weight", class_weight, len(logits))
    return reference.normalize_weights(reference.log_weights(logits, class_weight), log_total)


def selector_gradient(
    dots: Tensor, logits: Tensor, p: Tensor, *, mean_dot: Tensor | None = None
) -> Tensor:
    """The cotangent of the selector's logits that one backward pass turns into dL_val/dphi.

    dL_val/dw_j = -(d_j - sum_i p_i d_i) / S, times dw_j/dz_j:
    dL_val/dz_j = -p_j (d_j - sum_i p_i d_i) sigmoid(-z_j).

    Args:
        dots: d [B], from `hypergradient_dots`.
        logits: z [B], the selector's outputs.
        p: [B], from `normalize_weights`.
        mean_dot: [], sum_i p_i d_i over the global batch where this one is a part of it.

    Returns:
        dL_val/dz [B]; call `logits.backward(selector_gradient(...))`.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong or differing shapes.

    Source: row 7 (derivative of the normalised weighted loss by one weight).

    Example:
        >>> import torch, mts_fast
        >>> z, d = torch.zeros(2), torch.tensor([1.0, -1.0])
        >>> mts_fast.selector_gradient(d, z, mts_fast.normalize_weights(z)).tolist()
        [-0.25, 0.25]
    """
    op = "selector_gradient"
    for name, value in (("logits", logits), ("dots", dots), ("p", p)):
        check_floating(op, name, value, ndim=1)
        if value.shape != logits.shape:
            fail(ValueError, op, name, f"of shape {tuple(logits.shape)}", tuple(value.shape))
    return reference.selector_gradient(dots, logits, p, mean_dot)
