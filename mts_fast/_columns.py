"""Questions about hundreds of tensors at once, asked by C functions: a loop in Python over the
parameters of a model costs more than the kernel that serves them all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import attrgetter, is_, mul

import torch
from torch import Tensor

# of the base class: what a subclass overrides is not asked
_data_ptr = torch._C.TensorBase.data_ptr
_numel = torch._C.TensorBase.numel
_element_size = torch._C.TensorBase.element_size
_is_contiguous = torch._C.TensorBase.is_contiguous
_is_neg = torch._C.TensorBase.is_neg
_stride = torch._C.TensorBase.stride
_detach = torch._C.TensorBase.detach
_as_strided = torch._C.TensorBase.as_strided
_dtype, _shape, _device, _layout, _requires_grad, _data = map(
    attrgetter, ("dtype", "shape", "device", "layout", "requires_grad", "data")
)
PLAIN_TYPES = {Tensor, torch.nn.Parameter}
# without complex ones, which may be conjugated by a mark alone, and quantized ones
PLAIN_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of their first entries."""
    return list(map(_data_ptr, tensors))


def sizes_of(tensors: Sequence[Tensor]) -> list[int]:
    """Their numbers of entries."""
    return list(map(_numel, tensors))


def bytes_of(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of their entries."""
    return list(map(mul, map(_numel, tensors), map(_element_size, tensors)))


def dtypes_of(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes that occur."""
    return set(map(_dtype, tensors))


def devices_of(tensors: Sequence[Tensor]) -> set[torch.device]:
    """The devices that occur."""
    return set(map(_device, tensors))


def shapes_of(tensors: Sequence[Tensor]) -> list[torch.Size]:
    """Their shapes."""
    return list(map(_shape, tensors))


def strides_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Their strides."""
    return list(map(_stride, tensors))


def are_tensors(column: Sequence[object]) -> bool:
    """Whether all are tensors of torch's own class."""
    return set(map(type, column)) <= PLAIN_TYPES


def are_missing(column: Sequence[object]) -> bool:
    """Whether all are None."""
    return set(map(type, column)) <= {type(None)}


def are_strided(tensors: Sequence[Tensor]) -> bool:
    """Whether none is sparse or of another layout."""
    return set(map(_layout, tensors)) <= {torch.strided}


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense, with the last axis innermost."""
    return all(map(_is_contiguous, tensors))


def are_plain(column: Sequence[Tensor]) -> bool:
    """Whether torch's multi-tensor operators take all of them (`is_plain`)."""
    return (
        are_tensors(column)
        and dtypes_of(column) <= PLAIN_DTYPES
        and are_strided(column)
        and not any(map(_is_neg, column))
    )


def is_plain(t: Tensor) -> bool:
    """Whether torch's multi-tensor operators take it: a dense tensor of torch's own class."""
    return (
        type(t) in PLAIN_TYPES
        and t.dtype in PLAIN_DTYPES
        and t.layout is torch.strided
        and not t.is_neg()
    )


def are_of_one_kind(tensors: Sequence[Tensor]) -> bool:
    """Whether all have one device and one dtype."""
    return len(dtypes_of(tensors)) <= 1 and len(devices_of(tensors)) <= 1


def any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd follows one of them."""
    return any(map(_requires_grad, tensors))


def are_same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory without a graph."""
    return list(map(_detach, tensors))


def data_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory without a graph, written to without a trace."""
    return list(map(_data, tensors))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Contiguous tensors of one dtype side by side, [sum of their sizes]: a copy."""
    return torch._utils._flatten_dense_tensors(tensors)


def parts_of(
    whole: Tensor, shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Views of a vector's memory with these shapes and strides, side by side from its first entry
    on; each tensor has no gaps."""
    sizes = map(math.prod, shapes)
    starts = itertools.accumulate(sizes, initial=whole.storage_offset())
    return list(map(_as_strided, itertools.repeat(whole), shapes, strides, starts))
