"""What the graph of a training forward holds that the forward with tangents needs again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._ambient import FunctionMode

# maps that are linear in their first two arguments together: (input, weight, bias, ...)
LINEAR = {torch.conv1d, torch.conv2d, torch.conv3d, F.linear}
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
class LinearCall:
    """A call of a linear map, and what followed it before the next one."""

    weight: int  # its address
    shape: torch.Size  # of the input
    output: Unchanged | None = None  # where BatchNorm keeps it, too
    statistics: BatchStatistics | None = None  # of that BatchNorm
    # outputs of ReLUs, by their number among all calls since this one
    rectified: dict[int, Unchanged] = field(default_factory=dict)

    def matches(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a call with these arguments is the same one."""
        return x.shape == self.shape and weight.data_ptr() == self.weight

    def result(self) -> Tensor | None:
        """The output, where nothing has written to it since."""
        return None if self.output is None else self.output.value()


class RecordedOutputs(FunctionMode):
    """Around the training forward: every linear map in order, with outputs that autograd keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: deque[LinearCall] = deque()
        self._last: Unchanged | None = None  # the output of the last one
        self._result: Tensor | None = None
        self._since = 0  # calls since then

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._since += 1
        norms = func is F.batch_norm and bool(args) and trains(*args, **kwargs)
        read = self._read(args[0]) if norms else None
        result = func(*args, **kwargs)
        if read is not None:
            self.calls[-1].output = read
            self.calls[-1].statistics = _statistics(result, *args, **kwargs)
        elif func in LINEAR and len(args) > 1:
            self.calls.append(LinearCall(args[1].data_ptr(), args[0].shape))
            self._result, self._last = result, Unchanged.of(result)
            self._since = 0
        elif makes_rectified(func, *args, **kwargs) and _saves_result(result):
            self._note_rectified(result)
        return result

    def _note_rectified(self, result: Tensor) -> None:
        if self.calls:
            self.calls[-1].rectified[self._since] = Unchanged.of(result)

    def _read(self, x: Tensor) -> Unchanged | None:
        """The last output, where BatchNorm reads that and autograd keeps it. An activation in
        place, or a sum, would be computed again on its own result."""
        last = self._last
        if x is not self._result or last is None or last.value() is None or not _is_saved(x):
            return None
        return last

    def __exit__(self, *raised: object) -> None:
        self._result = self._last = None
        super().__exit__(*raised)


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
    """Those that autograd keeps for F.batch_norm's backward; None without weight and bias, and in
    mixed dtypes."""
    node: Any = result.grad_fn
    if weight is None or bias is None or node is None or node.name() not in _NORM_NODES:
        return None
    mean, inverse = node._saved_result1, node._saved_result2
    dtypes = {t.dtype for t in (input, weight, bias, mean, inverse)}
    if len(dtypes) > 1 or not mean.shape == inverse.shape == weight.shape == bias.shape:
        return None
    return BatchStatistics(mean.detach(), inverse.detach(), weight.data_ptr(), bias.data_ptr())
