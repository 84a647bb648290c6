"""Which function calls between layers might exchange entries of different samples.

A check of one forward holds for the next one only where nothing but the values of activations has
changed. Samples can be exchanged by an index or a permutation whose values have changed (mixup,
routing to experts), or by a sum over the batch behind a factor that was zero. So every forward with
a call of this kind is checked; and forwards are told apart by the order in which axes are moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket


def _words(text: str) -> list[str]:
    return text.split()


# names with their in-place and operator forms; each entry depends on its own position alone
_BINARY = _words(
    """add sub mul div truediv floordiv mod pow maximum minimum fmax fmin fmod remainder
    true_divide floor_divide divide multiply subtract rsub atan2 hypot logaddexp logaddexp2
    xlogy lerp addcmul addcdiv where masked_fill copysign and or xor"""
)
_POINTWISE = _words(
    """abs absolute neg negative positive exp exp2 expm1 log log2 log10 log1p sqrt rsqrt
    reciprocal square sign sgn sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh
    sigmoid logit erf erfc erfinv lgamma digamma sinc softplus softsign relu relu6 leaky_relu
    elu selu celu gelu silu mish hardtanh hardswish hardsigmoid hardshrink softshrink tanhshrink
    logsigmoid threshold rrelu prelu clamp clamp_min clamp_max clip round floor ceil trunc frac
    nan_to_num dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    feature_alpha_dropout clone detach contiguous to type type_as float double half bfloat16
    cuda cpu requires_grad retain_grad zeros_like ones_like empty_like rand_like randn_like
    full_like fill zero bernoulli real imag"""
)
# shapes, joins and neighbourhoods: entries keep their order along every axis, or the batch axis is
# by torch's convention not among those that are combined
_REGROUPINGS = _words(
    """view reshape flatten unflatten unsqueeze squeeze expand expand_as broadcast_to repeat
    tile repeat_interleave view_as reshape_as broadcast_tensors cat concat concatenate stack
    hstack vstack dstack pad unfold fold atleast_1d atleast_2d atleast_3d ravel max_pool1d
    max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d interpolate upsample pixel_shuffle pixel_unshuffle
    channel_shuffle grid_sample affine_grid local_response_norm layer_norm rms_norm group_norm
    instance_norm batch_norm complex view_as_real view_as_complex"""
)
_INDEPENDENT = {
    *_POINTWISE,
    *_REGROUPINGS,
    *_BINARY,
    *(f"__{prefix}{name}__" for name in _BINARY for prefix in ("", "r", "i")),
    *("__neg__", "__pos__", "__abs__", "__invert__"),
    # of this library, a loss for every sample
    *("mts_fast::cross_entropy", "mts_fast::linear_cross_entropy"),
}
_MOVES = _words(
    """transpose permute movedim moveaxis swapaxes swapdims t T mT H mH adjoint rot90 einsum"""
)
# losses of every sample or position, if they are not reduced
_LOSSES = _words(
    """cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits mse_loss
    l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss gaussian_nll_loss poisson_nll_loss
    cosine_embedding_loss margin_ranking_loss multi_margin_loss"""
)
# functions that combine or move the entries of some axes -> position of the axes' argument, and its
# default (None: all axes)
_ALONG: dict[str, tuple[int, int | None]] = {
    name: axes
    for axes, names in {
        (1, None): """sum nansum mean nanmean var std var_mean std_mean amax amin aminmax max min
            argmax logsumexp prod median nanmedian any all count_nonzero""",
        (1, -1): """softmax log_softmax softmin cumsum cumprod cummax logcumsumexp sort argsort
            msort flip fliplr mode glu""",
        (1, 0): """unbind select narrow index_select gather take_along_dim scatter scatter_add
            scatter_reduce index_add index_copy index_fill""",
        (2, 0): "chunk split tensor_split split_with_sizes",
        (2, 1): "normalize cosine_similarity",
        (2, -1): """topk kthvalue vecdot linalg_vecdot fft_fft fft_ifft fft_rfft fft_irfft fft_hfft
            fft_ihfft""",
        (2, None): """fft_fftn fft_ifftn fft_rfftn fft_irfftn norm roll renorm vector_norm
            linalg_vector_norm linalg_norm""",
        (4, -1): "gumbel_softmax",
    }.items()
    for name in _words(names)
}
# layers, unless their weight is made from activations
_LAYERS = _words(
    """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"""
)
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "baddbmm", "addmm", "addbmm"}


@functools.lru_cache(maxsize=4096)
def plain_name(function: Callable[..., Any]) -> str:
    """The function's name without an in-place underscore; a property's own name; with its namespace
    that of a custom operator or of this library, which may have the name of another of torch's."""
    name = getattr(function, "__name__", str(function))
    if isinstance(function, OpOverload):
        function = function.overloadpacket
    if isinstance(function, OpOverloadPacket):
        qualified = function._qualified_op_name
        namespace, _, name = qualified.partition("::")
        if namespace != "aten":
            return qualified
    if (getattr(function, "__module__", None) or "").startswith("mts_fast."):
        return f"mts_fast::{name}"
    if name == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name if name.endswith("__") else name.removesuffix("_")


@functools.lru_cache(maxsize=4096)
def writes_in_place(function: Callable[..., Any]) -> bool:
    """Whether the function writes to its first argument."""
    name = getattr(function, "__name__", "")
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return True
    return name.startswith("__i") and name not in ("__invert__", "__index__")


def move_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object | None:
    """Name and axes of a call that moves axes, by which two forwards are told apart; or None."""
    if name not in _MOVES:
        return None
    axes = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
    return name, str([a for a in axes if not _has_tensors(a)])


def may_mix(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: int,
    in_order: Callable[[Any], bool],
    *,
    first_axis: bool = False,
) -> bool:
    """Whether a call may bring entries of several of the B samples together, or in another order.

    With `first_axis` the samples are the rows of axis 0 and no other axis counts.

    `in_order` says of an index whether it is known to be 0, 1, 2, ... An axis counts as one of
    samples where it has B entries, the first also where it has a multiple. True for functions that
    are not known here.
    """
    if size == 1 or name in _INDEPENDENT or name in _MOVES:
        return False
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if x is None:
        return True

    def holds_samples(axis: int) -> bool:
        if not x.ndim:
            return False
        if first_axis:
            return axis % x.ndim == 0
        length = x.shape[axis]
        return length == size or (axis % x.ndim == 0 and length % size == 0)

    if name in ("__getitem__", "__setitem__"):
        return _index_may_mix(x, args[1], holds_samples, in_order)
    if name in _ALONG:
        return any(map(holds_samples, _axes(name, args, kwargs, x.ndim)))
    if name in _PRODUCTS:
        operands = [a for a in args if isinstance(a, Tensor)]
        return _product_may_mix(operands, 0 if first_axis else size)
    if name in _LAYERS:
        return any(map(_is_activation, args[1:]))
    if name == "scaled_dot_product_attention":
        return x.ndim < 3 or x.shape[0] % size != 0
    if name == "embedding":
        table = kwargs.get("weight", args[1] if len(args) > 1 else x)
        return bool(table.shape[0] % size == 0)
    if name in _LOSSES:
        return kwargs.get("reduction") != "none"
    return True


def _axes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> list[int]:
    position, otherwise = _ALONG[name]
    named = [kwargs[k] for k in ("dim", "dims", "axis") if k in kwargs]
    axes = named[0] if named else args[position] if len(args) > position else otherwise
    if isinstance(axes, int) and not isinstance(axes, bool):
        # axes may also be given one by one, as in x.sum(0, 1)
        more = [] if named else [a for a in args[position + 1 :] if type(a) is int]
        return [axes, *(a for a in more if -ndim <= a < ndim)] if ndim else []
    if isinstance(axes, tuple | list) and all(type(a) is int for a in axes):
        return list(axes) if ndim else []
    return list(range(ndim))


def _index_may_mix(
    x: Tensor, index: Any, holds_samples: Callable[[int], bool], in_order: Callable[[Any], bool]
) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    entries = [i for i in items if i is not None and i is not Ellipsis]
    consumed = sum(i.ndim if _is_mask(i) else 1 for i in entries)
    axis = 0
    for item in items:
        if item is None:
            continue
        if item is Ellipsis:
            axis += x.ndim - consumed
            continue
        if isinstance(item, slice):
            whole = (
                item.start in (None, 0)
                and item.step in (None, 1)
                and (item.stop is None or (type(item.stop) is int and item.stop >= x.shape[axis]))
            )
            if not whole and holds_samples(axis):
                return True
            axis += 1
            continue
        width = item.ndim if _is_mask(item) else 1
        if not in_order(item) and any(holds_samples(a) for a in range(axis, axis + width)):
            return True
        axis += width
    return False


def _is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) and item.ndim > 0


def _product_may_mix(operands: list[Tensor], size: int) -> bool:
    """False where the operands share a leading batch axis; else by the axis that is summed."""
    left, right = operands[-2:] if len(operands) > 1 else (operands[0], operands[0])
    batched = size > 0 and min(left.ndim, right.ndim) >= 3
    if batched and not (left.shape[0] % size or right.shape[0] % size):
        return False
    both = _is_activation(left) and _is_activation(right)
    return both or left.ndim == 0 or left.shape[-1] == size


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
