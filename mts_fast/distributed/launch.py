"""The process group of a command that a launcher has started several times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from mts_fast._launcher import Place, timeout_minutes
from mts_fast._process import ended_at_once


@contextmanager
def process_group(place: Place) -> Iterator[None]:
    """Inside, torch.distributed has a group of all ranks: gloo for what lies in main memory, NCCL
    beside it where torch has it and there is a GPU. Each rank has the GPU of its local number.

    Raises:
        ValueError: variables of the launcher that do not fit.
        RuntimeError: the ranks do not find each other.
    """
    wait = timedelta(minutes=timeout_minutes())
    cards = torch.cuda.device_count()
    if place.local_rank < cards:
        torch.cuda.set_device(place.local_rank)
    backend = "cpu:gloo,cuda:nccl" if cards and dist.is_nccl_available() else "gloo"
    # it waits for ranks that may have died
    with ended_at_once():
        dist.init_process_group(
            backend, timeout=wait, rank=place.rank, world_size=place.ranks, init_method="env://"
        )
    try:
        yield
    finally:
        # also what ends the others' wait where this rank has failed
        dist.destroy_process_group()
