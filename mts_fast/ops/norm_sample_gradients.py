"""Every sample's gradients of a norm's weight and bias; contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_bool,
    check_device,
    check_floating,
    check_length,
    check_number,
    check_positive_int,
    fail,
)
from mts_fast.backends.cpp import norm_sample_gradients as cpp
from mts_fast.backends.registry import register, register_triton, resolve
from mts_fast.backends.triton import norm_sample_gradients as triton
from mts_fast.backends.triton.eligibility import reasons_against_triton

LAYER_NORM, GROUP_NORM = "layer_norm_sample_gradients", "group_norm_sample_gradients"
# options of the layer norm that pick another kernel; a request's variant joins them by "+"
CENTERED, BIAS = "centered", "bias"
GROUPS = "groups="  # and their number: the variant of the group norm

register(LAYER_NORM, "reference", reference.layer_norm_sample_gradients)
register(GROUP_NORM, "reference", reference.group_norm_sample_gradients)
register(LAYER_NORM, "cpp", cpp.layer_norm_sample_gradients, cpp.reasons, wins=cpp.layer_norm_wins)
register(GROUP_NORM, "cpp", cpp.group_norm_sample_gradients, cpp.reasons, wins=cpp.group_norm_wins)
register_triton(LAYER_NORM, triton.layer_norm_sample_gradients, reasons_against_triton)
register_triton(GROUP_NORM, triton.group_norm_sample_gradients, reasons_against_triton)


def layer_norm_sample_gradients(
    x: Tensor, b: Tensor, *, eps: float = 1e-5, centered: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Each sample's gradients of the weight and bias of a layer norm or an RMS norm.

    weight_ic = sum_t x^_itc b_itc, bias_ic = sum_t b_itc, with
    x^ = (x - mean_t) / sqrt(variance_t + eps) over the C channels of each position t.

    Args:
        x: [B, T, C], the norm's input; floating point.
        b: [B, T, C], the gradient at its output; floating point.
        eps: added to the variance, as torch's layer_norm and rms_norm do.
        centered: False for an RMS norm: the mean is 0, the variance that around 0.
        bias: whether the bias's gradient is wanted.

    Returns:
        (weight [B, C], bias [B, C] or None), float32 (float64 where x or b is float64); without
        derivatives.

    Raises:
        TypeError, ValueError: wrong dtypes, differing shapes or devices, a negative eps.

    Notes:
        Both kernels read x and b once, and do not write x^; they accumulate in float32 (float64)
        and are deterministic. The C++ kernel takes x and b of one dtype, float32 or float64, the
        Triton kernel any dtypes and strides, and rows of 8192 channels (4096 in float64) at most;
        what a kernel does not take runs the reference.

    Source: the weights of a norm in row 6, where each sample's own gradient is <v, gradient_i>.

    Example:
        >>> import torch
        >>> from mts_fast.ops import layer_norm_sample_gradients
        >>> x, b = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[5.0, 7.0]]])
        >>> weight, bias = layer_norm_sample_gradients(x, b, eps=0.0)
        >>> weight.tolist(), bias.tolist()
        ([[-5.0, 7.0]], [[5.0, 7.0]])
    """
    _check_pair(LAYER_NORM, x, b, "[B, T, C]")
    check_number(LAYER_NORM, "eps", eps, at_least=0)
    check_bool(LAYER_NORM, "centered", centered)
    check_bool(LAYER_NORM, "bias", bias)
    with torch.no_grad():
        run = resolve(LAYER_NORM, [x, b], layer_norm_variant(centered, bias))
        return run(x, b, eps, centered, bias)


def group_norm_sample_gradients(
    x: Tensor,
    b: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample's gradients of the weight and bias of a group, instance or batch norm.

    weight_ic = sum_s x^_ics b_ics, bias_ic = sum_s b_ics, with x^ = (x - mean) / sqrt(variance +
    eps) over the C / groups channels and S positions of each group of a sample.

    Args:
        x: [B, C, S], the norm's input; floating point.
        b: [B, C, S], the gradient at its output; floating point.
        groups: of equally many channels; 1 to C. C is an instance norm.
        eps: added to the variance.
        mean, variance: [C], both or none: those of a batch norm in eval mode, in place of each
            group's own.

    Returns:
        (weight [B, C], bias [B, C]), float32 (float64 where x or b is float64); without
        derivatives.

    Raises:
        TypeError, ValueError: wrong dtypes, differing shapes or devices, groups that do not divide
            C, a negative eps, one of mean and variance alone.

    Notes:
        As `layer_norm_sample_gradients`. The Triton kernel reads x once more where a group has more
        than 8192 entries (4096 in float64).

    Source: the weights of a norm in row 6, where each sample's own gradient is <v, gradient_i>.

    Example:
        >>> import torch
        >>> from mts_fast.ops import group_norm_sample_gradients
        >>> x, b = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[5.0, 7.0]]])
        >>> weight, bias = group_norm_sample_gradients(x, b, 1, eps=0.0)
        >>> weight.tolist(), bias.tolist()
        ([[2.0]], [[12.0]])
    """
    _check_pair(GROUP_NORM, x, b, "[B, C, S]")
    channels = x.shape[1]
    check_positive_int(GROUP_NORM, "groups", groups)
    if channels % groups:
        expected = f"a divisor of the {channels} channels of x"
        fail(ValueError, GROUP_NORM, "groups", expected, groups, "pass the norm's num_groups")
    check_number(GROUP_NORM, "eps", eps, at_least=0)
    tensors = [x, b]
    if (mean is None) != (variance is None):
        missing, passed = ("variance", "mean") if variance is None else ("mean", "variance")
        hint = "pass both, or none for each group's own"
        fail(ValueError, GROUP_NORM, missing, f"a tensor, as {passed} is", None, hint)
    for name, value in (("mean", mean), ("variance", variance)):
        if value is not None:
            check_floating(GROUP_NORM, name, value, ndim=1)
            check_length(GROUP_NORM, name, value, channels)
            check_device(GROUP_NORM, name, value, x.device, "x")
            tensors.append(value)
    with torch.no_grad():
        run = resolve(GROUP_NORM, tensors, group_norm_variant(groups))
        return run(x, b, groups, eps, mean, variance)


def layer_norm_variant(centered: bool, bias: bool) -> str:
    """The variant of a request for these options."""
    return "+".join(name for name, chosen in ((CENTERED, centered), (BIAS, bias)) if chosen)


def group_norm_variant(groups: int) -> str:
    """The variant of a request: the number of groups decides the kernel's tile."""
    return f"{GROUPS}{groups}"


def groups_of_variant(variant: str) -> int:
    """The number of groups of such a variant."""
    return int(variant.removeprefix(GROUPS))


def _check_pair(op: str, x: Tensor, b: Tensor, axes: str) -> None:
    check_floating(op, "x", x, ndim=3)
    check_floating(op, "b", b, ndim=3)
    if x.shape != b.shape:
        expected = f"{axes} of x's shape {tuple(x.shape)}"
        fail(ValueError, op, "b", expected, tuple(b.shape), "it is the gradient at the output")
    check_device(op, "b", b, x.device, "x")
