"""normalize_weights and selector_gradient: from the selector's logits to p, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_device, check_floating, check_length, check_not_empty, fail
from mts_fast.backends.eligibility import under_transform


def normalize_weights(
    logits: Tensor, *, class_weight: Tensor | None = None, log_total: Tensor | None = None
) -> Tensor:
    """Turn the selector's logits into sample weights that sum to 1 over the global batch.

    p_i = w_i / S with w_i = sigmoid(z_i) * class_weight_i and S = sum_j w_j.

    Args:
        logits: z [B], floating point.
        class_weight: [B], the weight of each sample's class, already gathered; finite, >= 0.
        log_total: [], log S where this batch is a part of a larger one (micro-batches, ranks).

    Returns:
        p [B], differentiable in logits.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: wrong shapes, tensors on several devices, an empty batch, class weights that are
            negative or not finite, a log_total that is NaN or infinite (but for -inf: S = 0). Their
            values are checked on the CPU; on a GPU that would wait for the device.

    Notes:
        Computed as a softmax over log w, so saturated logits (|z| of 1e4) give exact ratios. Where
        every weight is zero (all class weights 0), p is zero everywhere.

    Source: rows 1 and 2 of docs/algorithm.md; the paper's normalised sample weight.

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
        check_device(op, "class_weight", class_weight, logits.device, "logits")
        if _readable(class_weight):
            low, high = (float(value) for value in torch.aminmax(class_weight.detach()))
            if not 0 <= low <= high < torch.inf:  # NaN is in no range
                hint = "a class without samples has weight 0, not 1 / 0"
                got = f"values from {low} to {high}"
                fail(ValueError, op, "class_weight", "finite and at least 0", got, hint)
    if log_total is not None:
        check_floating(op, "log_total", log_total, ndim=0)
        if _readable(log_total) and not float(log_total) < torch.inf:
            hint = "it is torch.logsumexp of log w over the global batch"
            fail(ValueError, op, "log_total", "a number or -inf", float(log_total), hint)
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
        ValueError: wrong or differing shapes or devices.

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
            hint = "pass one number for each of the same samples"
            expected = f"of shape {tuple(logits.shape)}"
            fail(ValueError, op, name, expected, tuple(value.shape), hint)
        check_device(op, name, value, logits.device, "logits")
    if mean_dot is not None:
        check_floating(op, "mean_dot", mean_dot, ndim=0)
    return reference.selector_gradient(dots, logits, p, mean_dot)


def _readable(value: Tensor) -> bool:
    """Whether reading the values neither waits for a device nor breaks a transform."""
    compiling = torch.compiler.is_compiling()
    return value.device.type == "cpu" and not compiling and not under_transform()
