"""Questions about hundreds of tensors at once, asked by C functions: a loop in Python over the
parameters of a model costs more than the kernel that serves them all."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_, mul
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor

A = TypeVar("A")
Question = Callable[[Sequence[Any]], A]

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


class Column(list[Tensor]):
    """A list of tensors that remembers what it answered, or of several such lists, one behind the
    other. For the time of one call, in which nothing changes the list or the tensors' layouts."""

    def __init__(self, tensors: Iterable[Tensor] = (), parts: Sequence[Column] = ()) -> None:
        super().__init__(tensors)
        self.parts = parts
        self.answers: dict[str, Any] = {}


def as_column(tensors: Sequence[Tensor]) -> Column:
    """These tensors as a column, which they may be already."""
    return tensors if isinstance(tensors, Column) else Column(tensors)


def end_to_end(*columns: Sequence[Tensor]) -> Column:
    """One column of several."""
    parts = list(map(as_column, columns))
    return parts[0] if len(parts) == 1 else Column(itertools.chain.from_iterable(parts), parts)


def _remembered(joined: Callable[[list[A]], A]) -> Callable[[Question[A]], Question[A]]:
    """A question that a `Column` is asked once; `joined` is the answer of its parts together."""

    def decorated(question: Question[A]) -> Question[A]:
        name = question.__name__

        @functools.wraps(question)
        def ask(tensors: Sequence[Any]) -> A:
            if not isinstance(tensors, Column):
                return question(tensors)
            answer = tensors.answers.get(name, tensors)  # itself: none yet
            if answer is tensors:
                parts = tensors.parts
                answer = joined([ask(p) for p in parts]) if parts else question(tensors)
                tensors.answers[name] = answer
            return answer

        return ask

    return decorated


def _all(answers: list[set[A]]) -> set[A]:
    return set().union(*answers)


def _behind(answers: list[list[A]]) -> list[A]:
    return list(itertools.chain.from_iterable(answers))


def pointers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of their first entries."""
    return list(map(_data_ptr, tensors))


@_remembered(_behind)
def sizes_of(tensors: Sequence[Tensor]) -> list[int]:
    """Their numbers of entries."""
    return list(map(_numel, tensors))


def bytes_of(tensors: Sequence[Tensor]) -> list[int]:
    """Bytes of their entries."""
    return list(map(mul, map(_numel, tensors), map(_element_size, tensors)))


@_remembered(_all)
def dtypes_of(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes that occur."""
    return set(map(_dtype, tensors))


@_remembered(_all)
def devices_of(tensors: Sequence[Tensor]) -> set[torch.device]:
    """The devices that occur."""
    devices = list(map(_device, tensors))
    # to compare with the first is quicker than to hash each
    alike = bool(devices) and devices.count(devices[0]) == len(devices)
    return set(devices[:1] if alike else devices)


@_remembered(_behind)
def shapes_of(tensors: Sequence[Tensor]) -> list[torch.Size]:
    """Their shapes."""
    return list(map(_shape, tensors))


def strides_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Their strides."""
    return list(map(_stride, tensors))


@_remembered(all)
def are_tensors(column: Sequence[object]) -> bool:
    """Whether all are tensors of torch's own class."""
    return set(map(type, column)) <= PLAIN_TYPES


def are_missing(column: Sequence[object]) -> bool:
    """Whether all are None."""
    return set(map(type, column)) <= {NoneType}


def are_present(column: Sequence[object]) -> bool:
    """Whether none is None."""
    return NoneType not in map(type, column)


@_remembered(all)
def are_strided(tensors: Sequence[Tensor]) -> bool:
    """Whether none is sparse or of another layout."""
    return set(map(_layout, tensors)) <= {torch.strided}


@_remembered(all)
def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense, with the last axis innermost."""
    return all(map(_is_contiguous, tensors))


@_remembered(all)
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


@_remembered(any)
def any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd follows one of them."""
    return any(map(_requires_grad, tensors))


def are_same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether both have the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def detached(tensors: Sequence[Tensor]) -> Column:
    """The same memory without a graph."""
    column = Column(map(_detach, tensors))
    if isinstance(tensors, Column):
        column.answers = {**tensors.answers, any_requires_grad.__name__: False}
    return column


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
    return list(map(_as_strided, itertools.repeat(whole), shapes, strides, starts))  # type: ignore[arg-type]


def at(column: Sequence[A], indices: Sequence[int]) -> Sequence[A]:
    """The entries at these indices; the column itself where these are all, in its order."""
    if len(indices) == len(column) and list(indices) == list(range(len(column))):
        return column
    return [column[i] for i in indices]


def put(out: list[A], indices: Sequence[int], values: Iterable[A]) -> None:
    """Each value at its index."""
    if len(indices) == len(out) and list(indices) == list(range(len(out))):
        out[:] = values
        return
    for i, value in zip(indices, values, strict=True):
        out[i] = value
