"""Bytes that an operator reads and writes, and its floating-point operations.

Where a count depends on values or on a kernel's inside, the lower one is taken.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

import mts_fast.ops  # noqa: F401 (defines torch.ops.mts_fast)
from mts_fast.reference.virtual_update import AdamState

aten, kernels = torch.ops.aten, torch.ops.mts_fast

# results that are not written, and changes of metadata
ALLOCATIONS = ("empty", "new_empty")
METADATA = {"set_", "resize_", "resize_as_"}
# in-place operators that do not read what they write
FILLS = {
    *("copy_", "zero_", "fill_", "bernoulli_", "exponential_", "normal_", "random_", "uniform_"),
    *("_foreach_copy_", "_foreach_zero_", "scatter_", "index_copy_"),
}
# of their first tensor, read as many entries as they write
GATHERS = {
    *("embedding", "gather", "index", "index_select", "nll_loss_forward", "nll_loss2d_forward"),
    "take",
}
# of their first tensor, write as many entries as these arguments have
SCATTERS = {
    **{"index_put_": "values", "_index_put_impl_": "values", "index_copy_": "source"},
    **{"index_add_": "source", "scatter_": "src", "scatter_add_": "src"},
}
# read `self` for its shape alone, as do *_like and new_*
SHAPE_ALONE = {
    *("_adaptive_avg_pool2d_backward", "avg_pool2d_backward", "max_pool2d_with_indices_backward"),
    *("nll_loss_backward", "nll_loss2d_backward"),
}
# which entry of a backward's output_mask needs an input
NEEDED_BY = {("convolution_backward", "weight"): 0, ("convolution_backward", "input"): 1}


def stored_bytes(tensors):
    """Bytes of the memory under these tensors: an expanded axis and a shared entry count once.

    Views of one storage that overlap without being equal count as at most the span of both.
    """
    views = {}
    for t in tensors:
        if t.numel() == 0 or t._is_zerotensor():
            continue
        strides = zip(t.stride(), t.shape, strict=True)
        axes = sorted((stride, size) for stride, size in strides if stride and size > 1)
        span = t.itemsize * (1 + sum(stride * (size - 1) for stride, size in axes))
        count = min(span, t.itemsize * math.prod(size for _, size in axes))
        first = t.itemsize * t.storage_offset()
        views.setdefault(_storage(t), {})[first, t.itemsize, *axes] = first, first + span, count
    total = 0
    for of_storage in views.values():
        firsts, ends, counts = zip(*of_storage.values(), strict=True)
        total += min(sum(counts), max(ends) - min(firsts))
    return total


def moved_bytes(func, args, kwargs, result):
    """Bytes read and written by an operator; 0 where it writes no tensor: views, metadata."""
    name, arguments = name_of(func), _arguments(func, args, kwargs)
    if name.startswith(ALLOCATIONS) or name in METADATA:
        return 0
    passed = {_storage(t) for _, value in arguments for t in tensors_of(value)}
    outputs = [t for t in tensors_of(result) if _storage(t) not in passed]
    written = [value for argument, value in arguments if _is_written(name, argument, arguments)]
    if not tensors_of(written) and not outputs:
        return 0
    read = [value for argument, value in arguments if _is_read(name, argument, arguments)]
    if name in GATHERS:
        source, *rest = tensors_of(read)
        return min(stored_bytes([source]), stored_bytes(outputs)) + stored_bytes([*rest, *outputs])
    if name in SCATTERS:
        _, *rest = tensors_of(args)
        values = [value for argument, value in arguments if argument.name == SCATTERS[name]]
        entries = min(stored_bytes(tensors_of(written)), stored_bytes(tensors_of(values)))
        return (1 if name in FILLS else 2) * entries + stored_bytes(rest)
    return stored_bytes(tensors_of(read)) + stored_bytes([*tensors_of(written), *outputs])


def _is_written(name, argument, arguments):
    """Whether an operator writes an argument's tensors."""
    if argument.alias_info is None or not argument.alias_info.is_write:
        return False
    # gradients of a fused optimizer are divided by the loss scale, where there is one
    divided = any(a.name == "grad_scale" and scale is not None for a, scale in arguments)
    return divided or not (argument.name == "grads" and name.startswith("_fused_"))


def _is_read(name, argument, arguments):
    """Whether an operator reads the values of an argument's tensors."""
    if argument.is_out or (name in FILLS and _is_written(name, argument, arguments)):
        return False
    if argument.name == "self" and (name in SHAPE_ALONE or _makes_like(name)):
        return False
    place = NEEDED_BY.get((name, argument.name))
    return place is None or next(mask[place] for a, mask in arguments if a.name == "output_mask")


def _makes_like(name):
    return name.endswith("_like") or name.startswith("new_")


def read_by_launch(op, args):
    """Tensors that the Triton kernel of an op reads: of kappa v, only what its rule needs."""
    if op == "hypergradient_direction":
        _, gradients, states, along = args[:4]
        args = (along, gradients, states) if isinstance(states[0], AdamState) else (along,)
    # columns of tensors and of states are sequences of their own classes
    leaves = tree_leaves([list(a) if isinstance(a, Sequence) else a for a in args])
    states = [vars(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)]
    return tensors_of([leaves, states])


def _convolution_backward_flops(*args, out_val):
    """torch's formula without the products of different groups, which it counts for the weight."""
    *rest, groups, mask = args
    parts = ([mask[0], False, False], [False, mask[1], False])
    formula = flop_counter.flop_registry[aten.convolution_backward]
    inputs, weight = (formula(*rest, groups, part, out_val=out_val) for part in parts)
    return inputs + weight // groups


def _product_flops(hidden, weight):
    return 2 * hidden.shape[:-1].numel() * weight.numel()


# torch's formulas, and those of operators that it has none for. linear_cross_entropy makes the
# logits anew in its backward and its tangent
FORMULAS = flop_counter.flop_registry | {
    aten.convolution_backward: _convolution_backward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
    kernels.hypergradient_dot: lambda a, v, *_, out_val: _product_flops(a, v),
    kernels.linear_cross_entropy_triton: lambda h, w, *_, out_val: _product_flops(h, w),
    kernels.linear_cross_entropy_backward_triton: lambda h, w, *rest, out_val: (
        _product_flops(h, w) * (1 + sum(rest[-1][:2]))
    ),
    kernels.linear_cross_entropy_tangent_triton: lambda h, w, *rest, out_val: (
        _product_flops(h, w) * (1 + (rest[-2] is not None))
    ),
}


def flops_of(func, args, kwargs, result):
    """Operations of a product, a convolution or attention; 0 of other operators."""
    formula = FORMULAS.get(func.overloadpacket)
    if formula is None:
        return 0
    flops = formula(*args, **kwargs, out_val=result)
    # torch's formulas of attention take all pairs, a causal one has half of them
    arguments = _arguments(func, args, kwargs)
    causal = any(argument.name == "is_causal" and value for argument, value in arguments)
    return flops // 2 if causal else flops


def _arguments(func, args, kwargs):
    """Every argument of an operator's schema that was passed, with its value."""
    schema = func._schema.arguments
    passed = list(zip(schema, args, strict=False))
    return passed + [(a, kwargs[a.name]) for a in schema[len(args) :] if a.name in kwargs]


def tensors_of(values):
    """Tensors in nested lists and dicts, but for sparse and nested ones, which have no strides."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [t for t in tensors if t.layout is torch.strided]


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def name_of(func):
    return func._schema.name.split("::")[1]
