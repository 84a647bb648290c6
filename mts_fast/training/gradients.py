"""Sets `.grad` of parameters as `zero_grad()` and a backward would have left it."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._columns import are_contiguous, are_plain, bytes_of, pointers_of
from mts_fast._multi_tensor import copies


def set_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """Set `.grad` of these parameters, each in memory of its own, and clear it on the optimizer's
    remaining parameters: the optimizer steps every parameter that has a gradient."""
    taking_part = set(map(id, parameters))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in taking_part:
                parameter.grad = None
    present = [i for i, g in enumerate(gradients) if g is not None]
    tensors = [g for g in gradients if g is not None]
    shared = [] if _lie_apart(tensors) else [present[k] for k in _sharing(tensors)]
    values = [g.contiguous() for i in shared if (g := gradients[i]) is not None]
    copied = dict(zip(shared, copies(values), strict=True))
    for i, (parameter, g) in enumerate(zip(parameters, gradients, strict=True)):
        parameter.grad = copied.get(i, g)


def _lie_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two share memory, in the usual case: all are contiguous, and in memory."""
    if not are_plain(tensors) or not are_contiguous(tensors):
        return False
    ranges = sorted(zip(pointers_of(tensors), bytes_of(tensors), strict=True))
    ends = [start + size for start, size in ranges]
    starts = [start for start, size in ranges[1:]]
    # a tensor without memory (of the meta device, or without entries) begins at 0
    return all(map(operator.le, ends, starts)) and (not ranges or ranges[0][0] > 0)


def _sharing(tensors: Sequence[Tensor]) -> list[int]:
    """Which need memory of their own: autograd may return one tensor twice, views of one tensor,
    or an expanded one; clipping and unscaling write in place. Sums over ranks lie side by side in a
    bucket, and share nothing."""
    used: dict[int, tuple[int, int]] = {}  # storage -> the entries up to now, a hull
    sharing = []
    for i, g in enumerate(tensors):
        storage, (start, stop) = g.untyped_storage().data_ptr(), _extent(g)
        first, end = used.get(storage, (stop, start))
        if not _is_dense(g) or (start < end and first < stop):
            sharing.append(i)
        used[storage] = min(first, start), max(end, stop)
    return sharing


def _is_dense(tensor: Tensor) -> bool:
    """Whether every entry has memory of its own."""
    return all(
        step != 0 or size == 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first entry of its storage that a tensor has, and the one behind its last."""
    start = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(start), int(start) + 1 + sum(int((size - 1) * step) for size, step in steps)
