"""linear_cross_entropy and its tangent: contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from mts_fast import reference
from mts_fast._check import check_device, check_floating, check_length, check_not_empty, fail
from mts_fast.backends.registry import register, register_triton, resolve
from mts_fast.backends.triton import linear_cross_entropy as triton
from mts_fast.ops.cross_entropy import check_target, is_overridden
from mts_fast.reference import Target

OP, TANGENT = "linear_cross_entropy", "linear_cross_entropy_tangent"
register(
    OP,
    "reference",
    lambda hidden, weight, bias, target: reference.linear_cross_entropy(
        hidden, weight, bias=bias, **target._asdict()
    ),
)
register(
    TANGENT,
    "reference",
    lambda hidden, weight, bias, target, **tangents: reference.linear_cross_entropy_tangent(
        hidden, weight, bias=bias, **target._asdict(), **tangents
    ),
)
register_triton(OP, triton.linear_cross_entropy, triton.reasons)
register_triton(TANGENT, triton.linear_cross_entropy_tangent, triton.reasons)


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
    """Per-sample cross-entropy of a last linear layer with too many classes to store logits.

    l_i = -log softmax(hidden_i weight^T + bias)[label_i].

    Args:
        hidden: [B, D], or [B, T, D] for sequences; floating point.
        weight: [C, D], of the layer; of hidden's dtype (under autocast, any).
        labels: [B], or [B, T]; integers in [0, C) or `ignore_index`.
        bias: [C].
        class_weight, label_smoothing, ignore_index: as for `weighted_cross_entropy`.

    Returns:
        l [B], differentiable in hidden, weight and bias. For sequences the mean over the positions
        that are not ignored; where all are ignored 0.

    Raises:
        TypeError: wrong or differing dtypes.
        ValueError: wrong shapes, an empty batch, tensors on several devices, labels out of range
            (checked on the CPU).

    Notes:
        The Triton kernels (`use_backend("triton")`) never write the logits: the forward keeps
        three scalars per row, the backward recomputes the logits and holds the gradient of one
        slice of classes at a time (2^26 entries at most). Products accumulate in float32 (float64
        of float64), with TF32 where torch's products use it (`torch.backends.cuda.matmul`).
        Deterministic. Second derivatives and torch.func take plain PyTorch, logits and all.
        In `MTSStep` use it as `loss=`, with a model that returns hidden states; the ghost engine
        supports it.

    Source: row 3.

    Example:
        >>> import torch, mts_fast
        >>> hidden, weight, labels = torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3])
        >>> mts_fast.linear_cross_entropy(hidden, weight, labels).exp().tolist()
        [4.0, 4.0]
    """
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if is_overridden(*tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            *(hidden, weight, labels, bias),
            class_weight=class_weight,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
    _check(OP, hidden, weight, bias)
    target = Target(labels, class_weight, label_smoothing, ignore_index)
    target = check_target(OP, target, hidden, "hidden", len(weight))
    return resolve(OP, [hidden, weight])(hidden, weight, bias, target)


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
    """Derivative of each loss [B] along tangents of weight [C, D] and bias [C]; None counts as 0.

    Row 6 of a last layer: arguments and errors as `linear_cross_entropy`; without derivatives.
    """
    _check(TANGENT, hidden, weight, bias)
    target = Target(labels, class_weight, label_smoothing, ignore_index)
    target = check_target(TANGENT, target, hidden, "hidden", len(weight))
    pairs = (("weight", weight_tangent, weight), ("bias", bias_tangent, bias))
    for name, tangent, parameter in pairs:
        if tangent is None:
            continue
        check_floating(TANGENT, f"{name}_tangent", tangent)
        if parameter is None or tangent.shape != parameter.shape:
            like = None if parameter is None else tuple(parameter.shape)
            expected = "None" if like is None else f"of shape {like} like {name}"
            hint = f"pass a direction of {name}, or None"
            fail(ValueError, TANGENT, f"{name}_tangent", expected, tuple(tangent.shape), hint)
        check_device(TANGENT, f"{name}_tangent", tangent, hidden.device, "hidden")
    with torch.no_grad():
        return resolve(TANGENT, [hidden.detach(), weight.detach()])(
            *(hidden, weight, bias, target),
            weight_tangent=weight_tangent,
            bias_tangent=bias_tangent,
        )


def _check(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(op, "hidden", hidden)
    if hidden.ndim not in (2, 3):
        hint = "put the width last, and flatten the axes between"
        fail(ValueError, op, "hidden", "[B, D] or [B, T, D]", tuple(hidden.shape), hint)
    check_not_empty(op, "hidden", hidden)
    check_floating(op, "weight", weight, ndim=2)
    check_not_empty(op, "weight", weight)
    if weight.shape[1] != hidden.shape[-1]:
        expected = f"[C, {hidden.shape[-1]}] for hidden of that width"
        hint = "pass the last layer's own weight and input"
        fail(ValueError, op, "weight", expected, tuple(weight.shape), hint)
    if bias is not None:
        check_floating(op, "bias", bias, ndim=1)
        check_length(op, "bias", bias, len(weight))
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        check_device(op, name, value, hidden.device, "hidden")
        if value.dtype != hidden.dtype and not autocast:
            expected = f"of dtype {hidden.dtype} like hidden"
            fail(TypeError, op, name, expected, value.dtype, "convert one, or use autocast")
