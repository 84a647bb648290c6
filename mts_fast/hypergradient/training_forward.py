"""What the graph of a training forward holds that the forward with tangents needs again.

Both run the same program. Every call of the first one is noted with the calls that made its
arguments; a result is taken only while the second one has made the same calls in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._ambient import FunctionMode
from mts_fast.hypergradient.nests import leaves

# maps that are linear in their first two arguments together: (input, weight, bias, ...)
LINEAR = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear}
# arguments that are compared by value, beside nests of these
_COMPARED = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_IN_PLACE = {torch.relu_, Tensor.relu_}
RECTIFIERS = {F.relu, torch.relu, Tensor.relu, *_IN_PLACE}
# nodes of BatchNorm whose second and third results are the mean and 1 / deviation of the batch
_NORM_NODES = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0"}


@dataclass(frozen=True)
class Unchanged:
    """A tensor of the graph, usable until something writes to it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Unchanged:
        """The tensor as it is now."""
        return cls(tensor.detach(), tensor._version)

    def value(self) -> Tensor | None:
        """The tensor; None where it was written to."""
        return self.tensor if self.tensor._version == self.version else None


@dataclass(frozen=True)
class BatchStatistics:
    """Of a BatchNorm in train mode: mean [C] and 1 / deviation [C] of the batch, and the addresses
    of its weight and bias."""

    mean: Tensor
    inverse: Tensor
    weight: int
    bias: int


@dataclass
class ForwardCall:
    """A call of the training forward that made tensors."""

    key: object  # see `Calls.key`
    weight: tuple[int, torch.Size] | None = None  # of a linear map: its address and shape
    result: Unchanged | None = None  # of a linear map or a ReLU, where autograd keeps it
    statistics: BatchStatistics | None = None  # of a BatchNorm

    def has_weight(self, weight: Tensor) -> bool:
        """Whether a linear map was called with this weight."""
        return self.weight == (weight.data_ptr(), weight.shape)

    def known(self) -> Tensor | None:
        """The result, where autograd keeps it and nothing has written to it."""
        return None if self.result is None else self.result.value()


class Calls:
    """Numbers the calls of a forward that make tensors, and tells what each was made of."""

    def __init__(self) -> None:
        self._number = 0
        self._made: dict[int, int] = {}  # id of a tensor -> the last call that gave it

    def copies_input(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        """Whether the call copies a tensor that no call has made, as the first forward of a kind
        gets copies of the batch: it counts for none."""
        return func is torch.clone and len(args) == 1 and id(args[0]) not in self._made

    def copied(self, copy: Tensor) -> Tensor:
        """The copy, which no call has made either."""
        self._made.pop(id(copy), None)
        return copy

    def key(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[object, ...]:
        """The function and its arguments: of tensors, the shape and the call that made it."""
        return func, self._described(args), self._described(kwargs)

    def _described(self, value: Any) -> object:
        if isinstance(value, Tensor):
            return self._made.get(id(value)), value.shape
        if isinstance(value, tuple | list):
            return [self._described(v) for v in value]
        if isinstance(value, dict):
            return {name: self._described(v) for name, v in value.items()}
        return value if isinstance(value, _COMPARED) else type(value)

    def note(self, results: Any) -> bool:
        """Count a call with these results; one that makes no tensor (of a size, a hook) is none."""
        made = leaves(results)
        if not made:
            return False
        self._number += 1
        for t in made:
            self._made[id(t)] = self._number
        return True


class RecordedForward(FunctionMode):
    """Around the training forward: every call in order, with results that autograd keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: deque[ForwardCall] = deque()
        self._order = Calls()
        # the last linear map, its result and that one's version
        self._last: tuple[ForwardCall, Tensor, Unchanged] | None = None

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if under_functorch():
            return func(*args, **kwargs)
        if self._order.copies_input(func, args):
            return self._order.copied(func(*args, **kwargs))
        made = ForwardCall(self._order.key(func, args, kwargs))
        norms = func is F.batch_norm and bool(args) and trains(*args, **kwargs)
        if norms:
            self._note_read(args[0])
        result = func(*args, **kwargs)
        if norms:
            made.statistics = _statistics(result, *args, **kwargs)
        elif func in LINEAR and len(args) > 1:
            made.weight = args[1].data_ptr(), args[1].shape
            self._last = made, result, Unchanged.of(result)
        elif makes_rectified(func, *args, **kwargs) and _saves_result(result):
            made.result = Unchanged.of(result)
        if self._order.note(result):
            self.calls.append(made)
        return result

    def _note_read(self, x: Tensor) -> None:
        """BatchNorm reads x: where that is the result of the last linear map, autograd keeps it.
        An activation in place, or a sum, would be computed again on its own result."""
        if self._last is None:
            return
        call, result, unchanged = self._last
        if x is result and unchanged.value() is not None and _is_saved(x):
            call.result = unchanged

    def __exit__(self, *raised: object) -> None:
        self._last = None
        super().__exit__(*raised)


def under_functorch() -> bool:
    """Whether the call is inside torch.func, whose tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def trains(*args: Any, training: bool = False, **_: Any) -> bool:
    """Whether a call of F.batch_norm is one in train mode."""
    return args[5] if len(args) > 5 else training


def makes_rectified(func: Callable[..., Any], *args: Any, inplace: bool = False, **_: Any) -> bool:
    """Whether a call is one of a ReLU that makes a new tensor."""
    if func not in RECTIFIERS or func in _IN_PLACE:
        return False
    return not (inplace or (len(args) > 1 and args[1]))


def _is_saved(x: Tensor) -> bool:
    """Whether autograd keeps it as it is, not under activation checkpointing."""
    return x.requires_grad and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _saves_result(rectified: Tensor) -> bool:
    """Whether autograd keeps the result of a ReLU."""
    node = rectified.grad_fn
    return node is not None and _is_saved(rectified) and node.name() == "ReluBackward0"


def _statistics(
    result: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> BatchStatistics | None:
    """Those that autograd keeps for F.batch_norm's backward; None without weight and bias, in mixed
    dtypes, and under checkpointing."""
    node: Any = result.grad_fn
    if weight is None or bias is None or node is None or node.name() not in _NORM_NODES:
        return None
    if not _is_saved(result):
        return None
    mean, inverse = node._saved_result1, node._saved_result2
    dtypes = {t.dtype for t in (input, weight, bias, mean, inverse)}
    if len(dtypes) > 1 or not mean.shape == inverse.shape == weight.shape == bias.shape:
        return None
    return BatchStatistics(mean.detach(), inverse.detach(), weight.data_ptr(), bias.data_ptr())
