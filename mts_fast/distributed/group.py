"""The ranks of a torch.distributed process group."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mts_fast._hosts import hosts_of
from mts_fast._sharding import Sharding
from mts_fast.distributed.buckets import Overlap, Sending
from mts_fast.distributed.failure import (
    Failure,
    out_of_step,
    raise_first,
    raise_lost,
)
from mts_fast.distributed.lost import is_communication, leave_word, silent_ranks
from mts_fast.distributed.moving import Moves
from mts_fast.distributed.packing import Layout
from mts_fast.distributed.ranks import Header, Opened, Sums
from mts_fast.distributed.shard import Shard

T = TypeVar("T")
TOGETHER = 2  # in the place of a header's flag: no header
MOST = 2**63 - 1  # that an int64 holds
GOOD, FAILED, OTHERWISE = 0, 1, 2  # of a rank in an exchange: OTHERWISE sends another layout


class Group:
    """All ranks of a group; `device` is that of the tensors that they exchange.

    Where the model is sharded, forwards and backwards have exchanges of their own.
    An error in the middle of one leaves the other ranks there: it is raised at once, and left as
    word for them.

    On the CPU what is decided travels with the data. On a GPU it goes by a group of the hosts
    (gloo), so that nothing has to wait for the device.
    """

    def __init__(
        self,
        op: str,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        in_band: bool,
        early_sums: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        self._op = op
        self.group = group
        self._device = device
        self._in_band = in_band
        self._early_sums = early_sums
        self._sharding = sharding  # of a model whose gradients come summed from a backward
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        self._hosts = hosts_of(group)
        self._layouts: dict[str, Layout] = {}
        self._overlaps: dict[str, Overlap] = {}
        self._exchanges = 0
        self._call = 0, 0  # rank 0's seed, and the number of the call
        self._seeded = 0  # times in it
        self._lost = ""  # who did not take part in an exchange; the group is broken since then

    def open(self, check: Callable[[], T], header: Callable[[T], Header]) -> tuple[T, Opened]:
        """Begin a call, of equal headers on all ranks."""

        def begun() -> tuple[T, Header]:
            checked = check()
            return checked, header(checked)

        result, error = self._tried(begun)
        told = None if result is None else result[1]
        same = {} if told is None else {k: repr(v) for k, v in told.same.items()}
        status = GOOD if error is None else FAILED
        sizes = () if told is None else told.sizes
        probing = told is not None and told.probing
        # of the most sizes that a call has
        numbers = [
            status,
            probing,
            _digest(sorted(same.items())),
            torch.initial_seed() & MOST,
            len(sizes),
            *sizes,
            *[0] * (4 - len(sizes)),
        ]
        said = self._agreed(numbers)
        if any(s[1] == TOGETHER for s in said):
            error = out_of_step(self._op)
        if error is not None or any(s[0] != GOOD for s in said):
            self._raise_together(error)
        if any(s[2] != said[0][2] for s in said):
            self._raise_together(self._difference(same))
        assert result is not None
        self._call, self._seeded = (said[0][3], result[1].number), 0
        shards = tuple(
            Shard(tuple(int(s[5 + i]) for s in said), self.index) for i in range(len(sizes))
        )
        return result[0], Opened(shards, any(s[1] for s in said))

    def rows(
        self, name: str, shard: Shard, compute: Callable[[], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Each tensor of `compute` as that of all ranks."""
        result, error = self._tried(lambda: [t.detach() for t in compute()])
        tensors = result or []
        layout = self._layouts.get(name)
        while True:
            if layout is None:
                layout = self._layouts[name] = self._agreed_layout(name, shard, tensors, error)
            status = GOOD
            if error is not None:
                status = FAILED
            elif len(shard) and Layout.of(tensors) != layout:
                status = OTHERWISE
            packed = layout.packed(tensors if status == GOOD and len(shard) else [], self._device)
            gathered, statuses = self._gathered(packed, max(shard.sizes), status)
            if not any(statuses):
                return layout.unpacked(torch.cat(shard.joined(gathered)))
            layout = None

    def moved(
        self,
        name: str,
        before: Shard,
        after: Shard,
        compute: Callable[[], Sequence[Tensor] | None],
    ) -> list[Tensor] | None:
        """Rows of other ranks in place of those that these get."""
        result, error = self._tried(compute)
        tensors = [t.detach() for t in result or []]
        layout = self._layouts.get(name)
        mine = Layout.of(tensors) if len(before) and tensors else None
        fits = layout is not None and (mine == layout or not len(before))
        status = FAILED if error is not None else GOOD if fits else OTHERWISE
        if OTHERWISE in self._statuses(status, error):
            told = self._told((len(before) > 0, mine))
            layouts = {of_rank for has_rows, of_rank in told if has_rows}
            layout = layouts.pop() if len(layouts) == 1 else None
            self._layouts.pop(name, None)
            if layout is None:
                return None
            self._layouts[name] = layout
        assert layout is not None
        rows = layout.packed(tensors if len(before) else [], self._device)
        return layout.unpacked(Moves.between(before, after).of(rows, self._exchange))

    def _exchange(self, received: Tensor, sent: Tensor, of: list[int], to: list[int]) -> None:
        with self._watched():
            dist.all_to_all_single(received, sent, of, to, group=self.group)

    def summed(
        self, name: str, like: Sequence[Tensor], extra: int, compute: Callable[[], Sums]
    ) -> Sums:
        """Gradients and numbers, summed over ranks; sums may begin while `compute` works."""
        overlap = self._overlap(name, like)
        sending = overlap.buckets.send(self.group)

        def watched() -> Sums:
            with overlap.watching(sending):
                return compute()

        try:
            result, error = self._tried(watched)
            gradients, numbers = result or ([None] * len(like), [])
            astray = error is None and overlap.went_astray(sending, gradients)
            told = [error is not None, astray, *(g is not None for g in gradients)]
            sums, counts, numbers = self._sum(sending, told, gradients, numbers, extra)
            if counts[0]:
                self._raise_together(error)
            if counts[1]:
                overlap.stop()
                sending = overlap.buckets.send(self.group)
                with self._watched():
                    sending.start_rest(gradients, torch.zeros(1, device=self._device))
                    sums, _ = sending.finish()
            overlap.learn(gradients, self._agreed)
        finally:
            overlap.release()
        if self._sharding is not None:
            return gradients, numbers
        return [s if count else None for s, count in zip(sums, counts[2:], strict=True)], numbers

    def _sum(
        self,
        sending: Sending,
        told: list[bool],
        gradients: Sequence[Tensor | None],
        numbers: Sequence[Tensor],
        extra: int,
    ) -> tuple[list[Tensor], list[float], list[Tensor]]:
        """Sums of gradients, of what ranks tell, and of numbers."""
        dtype = sending.number_dtype
        sent = [n.detach().to(self._device, dtype).reshape(1) for n in numbers]
        sent += [torch.zeros(1, dtype=dtype, device=self._device)] * (extra - len(numbers))
        if self._in_band:
            sent.insert(0, torch.tensor(told, dtype=dtype, device=self._device))
        tail = torch.cat(sent) if sent else torch.zeros(0, dtype=dtype, device=self._device)
        with self._watched():
            sending.start_rest(gradients, tail)
        if not self._in_band:  # meanwhile
            counts = [float(sum(c)) for c in zip(*self._agreed(told), strict=True)]
        with self._watched():
            sums, tail = sending.finish()
        if self._in_band:
            counts, tail = tail[: len(told)].tolist(), tail[len(told) :]
        return sums, counts, list(tail.unbind())

    def swapped(self, rows: Tensor, to: int, sender: int, size: int) -> Tensor:
        """Send packed rows to one rank, and receive `size` of another one's; every rank calls it.

        Both are ranks of the group. One row more is sent, since a message must not be empty.
        """
        sent = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        got = torch.empty(size + 1, rows.shape[1], dtype=torch.uint8, device=rows.device)
        members = dist.get_process_group_ranks(self.group)
        with self._watched():
            operations = [
                dist.P2POp(dist.isend, sent, members[to], self.group),
                dist.P2POp(dist.irecv, got, members[sender], self.group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return got[:size]

    def together(self, compute: Callable[[], T]) -> T:
        """Work after which all ranks go on, or none."""
        result, error = self._tried(compute)
        self._statuses(GOOD if error is None else FAILED, error)
        return result  # type: ignore[return-value]

    def led(self, compute: Callable[[], T]) -> T:
        """Rank 0 works, and every rank has the result."""
        result = self.together(compute if self.index == 0 else lambda: None)
        sent = [result]
        first = dist.get_process_group_ranks(self.group)[0]
        with self._watched():
            dist.broadcast_object_list(sent, first, group=self._hosts)
        return result if self.index == 0 else sent[0]  # type: ignore[return-value]

    def union(self, flags: Sequence[bool]) -> list[bool]:
        """Each set where one of the ranks has it set."""
        return [any(column) for column in zip(*self._agreed(flags), strict=True)]

    def seed(self) -> None:
        """Seed torch's default generators by a number that all ranks have."""
        self._seeded += 1
        torch.manual_seed(_digest((*self._call, self._seeded)))

    def _tried(self, compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """The result, or the error that all ranks can be told of."""
        try:
            return compute(), None
        except Exception as error:
            return None, self._caught(error)

    def _caught(self, error: Exception) -> Exception:
        """An error that all ranks can be told of in the next exchange; another one is raised."""
        if self._sharding is None or not self._sharding.in_pass:
            return error
        self._exchanges += 1
        if is_communication(error):
            self._lost = self._who(error)
            raise_lost(self._op, self._lost, error)
        self._lost = "an error in the middle of a forward or backward here"
        leave_word(dist.get_rank(), self._exchanges, f"stopped by {type(error).__name__}: {error}")
        raise error

    def _statuses(self, status: int, error: Exception | None) -> list[int]:
        """How every rank sees an exchange; raised together where one has failed."""
        # as long as a header, so that ranks in different places are told apart
        said = self._agreed([status, TOGETHER, *[0] * 7])
        if any(s[1] != TOGETHER for s in said):
            error = out_of_step(self._op)
        if error is not None or any(s[0] == FAILED for s in said):
            self._raise_together(error)
        return [s[0] for s in said]

    def _agreed(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every rank."""
        mine = torch.tensor(list(map(int, numbers)), dtype=torch.int64)
        said = [torch.empty_like(mine) for _ in range(self.size)]
        with self._watched():
            dist.all_gather(said, mine, group=self._hosts)
        return [s.tolist() for s in said]

    def _gathered(self, packed: Tensor, most: int, status: int) -> tuple[list[Tensor], list[int]]:
        """Packed rows [most, bytes] of every rank, and how it sees the exchange."""
        if not self._in_band:
            statuses = [s[0] for s in self._agreed([status])]
            if any(statuses):
                return [], statuses
        # one row more than the samples, for the status
        mine = torch.zeros(most + 1, packed.shape[1], dtype=torch.uint8, device=self._device)
        mine[: len(packed)] = packed
        mine[most, 0] = status
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self._watched():
            dist.all_gather(parts, mine, group=self.group)
        if self._in_band:
            statuses = [int(part[most, 0]) for part in parts]
        return parts, statuses

    def _agreed_layout(
        self, name: str, shard: Shard, tensors: list[Tensor], error: Exception | None
    ) -> Layout:
        """The layout that all ranks with rows have."""
        mine = Layout.of(tensors) if len(shard) and error is None else None
        said = self._told((Failure.of(error), mine))
        raise_first(self._op, [f for f, _ in said], self.index, error)
        layouts = {rank: layout for rank, (_, layout) in enumerate(said) if layout is not None}
        first_rank, first = next(iter(layouts.items()))
        for rank, layout in layouts.items():
            if layout != first:
                raise ValueError(
                    f"{self._op}: {name} must be of one dtype and width on every rank, got {layout}"
                    f" on rank {rank} and {first} on rank {first_rank}; pass the same columns"
                )
        return first

    def _overlap(self, name: str, like: Sequence[Tensor]) -> Overlap:
        overlap = self._overlaps.get(name)
        if overlap is None or not overlap.takes(like):
            numbers_alone = self._sharding is not None
            overlap = Overlap(like, numbers_alone=numbers_alone, learns=self._early_sums)
            self._overlaps[name] = overlap
        return overlap

    def _difference(self, same: dict[str, str]) -> ValueError:
        """The error of ranks that do not agree."""
        said = self._told(same)
        for name in dict.fromkeys(n for s in said for n in s):
            values = [s.get(name, "nothing") for s in said]
            for rank, value in enumerate(values):
                if value != values[0]:
                    return ValueError(
                        f"{self._op}: {name} must be the same on every rank, got {value[:300]} on"
                        f" rank {rank} and {values[0][:300]} on rank 0; build and call the step"
                        " alike on every rank"
                    )
        raise AssertionError("the digests differ and the values do not")

    def _told(self, thing: T) -> list[T]:
        """An object of every rank."""
        said: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(said, thing, group=self._hosts)
        return said

    def _raise_together(self, error: Exception | None) -> NoReturn:
        """Every rank is here, and one of them has failed."""
        raise_first(self._op, self._told(Failure.of(error)), self.index, error)
        raise AssertionError("no rank has failed")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, ranks wait for each other; where one does not come, it is named."""
        if self._lost:
            raise_lost(self._op, self._lost)
        self._exchanges += 1
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._lost = "no memory for an exchange here"
            leave_word(dist.get_rank(), self._exchanges, f"stopped by {type(error).__name__}")
            raise
        except RuntimeError as error:
            self._lost = self._who(error)
            raise_lost(self._op, self._lost, error)
        except BaseException as error:
            leave_word(dist.get_rank(), self._exchanges, f"stopped by {type(error).__name__}")
            self._lost = f"{type(error).__name__} in the middle of an exchange here"
            raise

    def _who(self, error: Exception) -> str:
        """Who is missing in an exchange that failed."""
        ranks = dist.get_process_group_ranks(self.group)
        silent, said = silent_ranks(ranks, dist.get_rank(), self._exchanges)
        stopped = [f"rank {rank} {text}" for rank, text in said.items() if text != "waiting"]
        stopped += [f"rank {rank}, which does not answer" for rank in silent]
        return ", ".join(stopped) or str(error).strip().splitlines()[0]


def _digest(values: object) -> int:
    """A number that differs where the values do, of 63 bits."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
