"""Questions about hundreds of tensors at once, asked by C functions: a loop in Python over the
parameters of a model costs more than the kernel that serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

# of the base class: what a subclass overrides is not asked
_data_ptr = torch._C.TensorBase.data_ptr
_numel = torch._C.TensorBase.numel
_is_contiguous = torch._C.TensorBase.is_contiguous
_dtype, _shape, _device = map(attrgetter, ("dtype", "shape", "device"))


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of their first entries."""
    return list(map(_data_ptr, tensors))


def sizes_of(tensors: Sequence[Tensor]) -> list[int]:
    """Their numbers of entries."""
    return list(map(_numel, tensors))


def dtypes_of(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes that occur."""
    return set(map(_dtype, tensors))


def devices_of(tensors: Sequence[Tensor]) -> set[torch.device]:
    """The devices that occur."""
    return set(map(_device, tensors))


def are_tensors(column: Sequence[object]) -> bool:
    """Whether all are tensors of torch's own class."""
    return set(map(type, column)) <= {Tensor, torch.nn.Parameter}


def are_missing(column: Sequence[object]) -> bool:
    """Whether all are None."""
    return set(map(type, column)) <= {type(None)}


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense, with the last axis innermost."""
    return all(map(_is_contiguous, tensors))


def shapes_of(tensors: Sequence[Tensor]) -> list[torch.Size]:
    """Their shapes."""
    return list(map(_shape, tensors))
