"""Sums of gradients over ranks, in buckets of one dtype that set out as soon as they are complete.

`Buckets` is the division, `Sending` one exchange. `Overlap` has the buckets of one row of the
algorithm: in its first exchange it learns which gradients are final once the backward has computed
them, and lets these set out in the middle of it from then on. What set out too early is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

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

    early: tensors, by number, that go before the others, in buckets of their own.
    numbers_alone: the tensors are summed elsewhere.
    """

    def __init__(
        self, like: Sequence[Tensor], *, early: Collection[int] = (), numbers_alone: bool = False
    ) -> None:
        self.shapes = [t.shape for t in like]
        # a number keeps its digits, which a bucket of 16-bit gradients would cut
        dtypes = [t.dtype for t in like]
        self.number_dtype = (
            torch.float64 if any(d == torch.float64 for d in dtypes) else torch.float32
        )
        self.buckets: list[_Bucket] = []
        if not numbers_alone:
            backward = range(len(like))[::-1]
            for numbers in (
                [i for i in backward if i in early],
                [i for i in backward if i not in early],
            ):
                # the numbers go with the last one
                self.buckets += sorted(
                    _planned(like, numbers), key=lambda b: b.dtype == self.number_dtype
                )
        last = self.buckets[-1] if self.buckets else None
        self.carries = last is not None and last.dtype == self.number_dtype

    def send(self, group: dist.ProcessGroup | None) -> Sending:
        """Begin an exchange, which every rank of the group ends by `finish`."""
        return Sending(self, group)


class Sending:
    """One exchange. Buckets set out in their order, so that it is that of all ranks."""

    def __init__(self, plan: Buckets, group: dist.ProcessGroup | None) -> None:
        self._plan = plan
        self._group = group
        self.number_dtype = plan.number_dtype
        self._works: list[Any] = []
        self._tail = torch.zeros(0)
        self._sums: list[Tensor | None] = [None] * len(plan.shapes)
        # tensors that are final before the others, and how many each bucket still waits for
        self._announced: dict[int, Tensor] = {}
        self._waits = [len(b.numbers) for b in plan.buckets]
        self._bucket_of = {i: k for k, b in enumerate(plan.buckets) for i in b.numbers}
        # the last one is sent with the numbers
        self._early = len(plan.buckets) - plan.carries

    def announce(self, i: int, tensor: Tensor) -> None:
        """Tensor number i is final; a bucket that is complete with it sets out."""
        if i not in self._announced:
            self._waits[self._bucket_of[i]] -= 1
        self._announced[i] = tensor.detach()
        while len(self._works) < self._early and not self._waits[len(self._works)]:
            bucket = self._plan.buckets[len(self._works)]
            self._start(bucket, [self._announced[j] for j in bucket.numbers])

    def has_sent(self, i: int) -> bool:
        """Whether the bucket of a tensor is under way."""
        return self._bucket_of[i] < len(self._works)

    def start_rest(self, tensors: Sequence[Tensor | None], numbers: Tensor) -> None:
        """Send what is not under way yet; a tensor that is None counts as zeros."""
        plan, self._tail = self._plan, numbers.to(self._plan.number_dtype)
        for bucket in plan.buckets[len(self._works) :]:
            carried = self._tail if plan.carries and bucket is plan.buckets[-1] else None
            sent = self._start(bucket, [tensors[i] for i in bucket.numbers], carried)
            self._tail = self._tail if sent is None else sent
        if not plan.carries:
            self._works.append(dist.all_reduce(self._tail, group=self._group, async_op=True))

    def finish(self) -> tuple[list[Tensor], Tensor]:
        """The sums over ranks of all tensors, and of the numbers.

        Each sum has memory of its own, beside others in a bucket.
        """
        for work in self._works:
            work.wait()
        return [s for s in self._sums if s is not None], self._tail

    def _start(
        self, bucket: _Bucket, tensors: Sequence[Tensor | None], numbers: Tensor | None = None
    ) -> Tensor | None:
        """Send a bucket, and numbers behind it; these, where their sums will be."""
        entries = bucket.entries + (0 if numbers is None else len(numbers))
        flat = torch.empty(entries, dtype=bucket.dtype, device=bucket.device)
        shapes = [self._plan.shapes[i] for i in bucket.numbers]
        pieces = flat[: bucket.entries].split([shape.numel() for shape in shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        for i, view in zip(bucket.numbers, views, strict=True):
            self._sums[i] = view
        _fill(views, tensors)
        tail = None
        if numbers is not None:
            tail = flat[bucket.entries :]
            tail.copy_(numbers)
        self._works.append(dist.all_reduce(flat, group=self._group, async_op=True))
        return tail


class Overlap:
    """The buckets of one row's gradients."""

    def __init__(self, like: Sequence[Tensor], *, numbers_alone: bool, learns: bool) -> None:
        self.like = list(like)
        self._numbers_alone = numbers_alone
        self._learns = learns and not numbers_alone
        self._learns &= sum(t.nbytes for t in like) > BUCKET_BYTES
        self._is_astray = False  # something is under way that was computed anew since
        self._early: tuple[int, ...] = ()
        self._noted: dict[int, tuple[Tensor, int]] = {}  # what hooks saw, and its version
        self.buckets = Buckets(like, numbers_alone=numbers_alone)

    def takes(self, like: Sequence[Tensor]) -> bool:
        """Take these tensors in place of the others, where they are of the same shapes: what all
        ranks have alike."""
        kinds = [[(t.shape, t.dtype, t.device) for t in ts] for ts in (like, self.like)]
        if kinds[0] == kinds[1]:
            self.like = list(like)
        return kinds[0] == kinds[1]

    @contextmanager
    def watching(self, sending: Sending) -> Iterator[None]:
        """Inside, gradients that a backward completes are noted; early ones set out."""
        self._noted.clear()
        self._is_astray = False
        numbers = range(len(self.like)) if self._learns else self._early
        hooks = [
            self.like[i].register_hook(partial(self._note, sending, i))
            for i in numbers
            if self.like[i].requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, sending: Sending, i: int, gradient: Tensor | None) -> None:
        # torch calls hooks with None where a function of the user's returns none
        if gradient is None or gradient.layout != torch.strided:
            return
        # a second backward over a parameter, when its first gradient may be under way
        self._is_astray |= i in self._noted and not self._learns and sending.has_sent(i)
        self._noted[i] = gradient.detach(), gradient._version
        if not self._learns:
            sending.announce(i, gradient)

    def went_astray(self, sending: Sending, gradients: Sequence[Tensor | None]) -> bool:
        """Whether something is under way that is not the gradient."""
        return self._is_astray or any(
            sending.has_sent(i) and not self._is_final(i, gradients) for i in self._noted
        )

    def _is_final(self, i: int, gradients: Sequence[Tensor | None]) -> bool:
        noted, g = self._noted.get(i), gradients[i]
        if noted is None or g is None or g.layout != torch.strided:
            return False
        tensor, version = noted
        same = tensor.data_ptr() == g.data_ptr() and tensor.shape == g.shape
        return same and tensor.stride() == g.stride() and g._version == version

    def learn(
        self,
        gradients: Sequence[Tensor | None],
        agreed: Callable[[Sequence[int]], list[list[int]]],
    ) -> None:
        """After a first exchange: which gradients are final in the backward of every rank that has
        any. `agreed` tells all ranks' numbers."""
        if not self._learns:
            return
        has_any = any(g is not None for g in gradients)
        final = [not has_any or self._is_final(i, gradients) for i in range(len(self.like))]
        said = agreed([has_any, *final])
        self._learns = False
        if any(s[0] for s in said):
            self._plan(i for i in range(len(final)) if all(s[1 + i] for s in said))

    def stop(self) -> None:
        """Send nothing early from now on."""
        self._learns = False
        self._plan(())

    def release(self) -> None:
        """Let go of the gradients."""
        self._noted.clear()

    def _plan(self, early: Iterable[int]) -> None:
        self._early = tuple(early)
        self.buckets = Buckets(self.like, early=set(self._early), numbers_alone=self._numbers_alone)


def _planned(like: Sequence[Tensor], numbers: Sequence[int]) -> list[_Bucket]:
    """Tensors of one dtype and device in their order, as many as fit."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i in numbers:
        kinds.setdefault((like[i].dtype, like[i].device), []).append(i)
    planned = []
    for (dtype, device), of_kind in kinds.items():
        room = BUCKET_BYTES // dtype.itemsize
        chunk: list[int] = []
        size = 0
        for i in of_kind:
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
