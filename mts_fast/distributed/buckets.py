"""Sums of gradients over ranks, in buckets of one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mts_fast._multi_tensor import overwrite

# of a bucket; DistributedDataParallel's default
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class _Bucket:
    """Some of the tensors, by number, side by side in memory."""

    dtype: torch.dtype
    device: torch.device
    numbers: tuple[int, ...]
    entries: int


class Buckets:
    """The layout of sums of these tensors, and of numbers beside them.

    numbers_alone: the tensors are summed elsewhere.
    """

    def __init__(self, like: Sequence[Tensor], *, numbers_alone: bool = False) -> None:
        self._shapes = [t.shape for t in like]
        self._buckets = [] if numbers_alone else _planned(like)
        # a number keeps its digits, which a bucket of 16-bit gradients would cut
        dtypes = [t.dtype for t in like]
        self.number_dtype = (
            torch.float64 if any(d == torch.float64 for d in dtypes) else torch.float32
        )

    def summed(
        self, group: dist.ProcessGroup | None, tensors: Sequence[Tensor | None], numbers: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The sums over ranks; a tensor that is None counts as zeros.

        Each sum has memory of its own, beside others in a bucket. All buckets are under way before
        the first is waited for.
        """
        sums: list[Tensor | None] = [None] * len(self._shapes)
        works, tail = [], None
        for bucket in self._buckets:
            carries = tail is None and bucket.dtype == self.number_dtype
            entries = bucket.entries + (len(numbers) if carries else 0)
            flat = torch.empty(entries, dtype=bucket.dtype, device=bucket.device)
            pieces = flat[: bucket.entries].split([self._shapes[i].numel() for i in bucket.numbers])
            views = [
                piece.view(self._shapes[i]) for i, piece in zip(bucket.numbers, pieces, strict=True)
            ]
            for i, view in zip(bucket.numbers, views, strict=True):
                sums[i] = view
            _fill(views, [tensors[i] for i in bucket.numbers])
            if carries:
                tail = flat[bucket.entries :]
                tail.copy_(numbers)
            works.append(dist.all_reduce(flat, group=group, async_op=True))
        if tail is None:
            tail = numbers.to(self.number_dtype)
            works.append(dist.all_reduce(tail, group=group, async_op=True))
        for work in works:
            work.wait()
        return [s for s in sums if s is not None], tail


def _planned(like: Sequence[Tensor]) -> list[_Bucket]:
    """Tensors of one dtype and device in their order, as many as fit."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, t in enumerate(like):
        kinds.setdefault((t.dtype, t.device), []).append(i)
    planned = []
    for (dtype, device), numbers in kinds.items():
        room = BUCKET_BYTES // dtype.itemsize
        chunk: list[int] = []
        size = 0
        for i in numbers:
            if chunk and size + like[i].numel() > room:
                planned.append(_Bucket(dtype, device, tuple(chunk), size))
                chunk, size = [], 0
            chunk.append(i)
            size += like[i].numel()
        if chunk:
            planned.append(_Bucket(dtype, device, tuple(chunk), size))
    return planned


def _fill(views: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    present = [(v, t) for v, t in zip(views, tensors, strict=True) if t is not None]
    for view, tensor in zip(views, tensors, strict=True):
        if tensor is None:
            view.zero_()
    overwrite([v for v, _ in present], [t for _, t in present])
