"""Which ranks no longer answer, by the store that the process group was made with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

# how long the other ranks have to say that they are alive, once an exchange has failed
PATIENCE = 5.0  # seconds


def silent_ranks(ranks: Sequence[int], me: int, number: int) -> tuple[list[int], dict[int, str]]:
    """(ranks that say nothing, what others said last) after exchange `number` has failed.

    Ranks are global ones. Every rank that is alive writes down that it is; what is not written
    within `PATIENCE` counts as lost.
    """
    store = store_of_all()
    if store is None:
        return [], {}
    before: timedelta = store.timeout  # type: ignore[attr-defined]
    try:
        store.set_timeout(timedelta(seconds=PATIENCE))
        store.set(_key(me, number), "waiting")
        deadline = time.monotonic() + PATIENCE
        waiting = [r for r in ranks if r != me]
        said: dict[int, str] = {}
        while waiting and time.monotonic() < deadline:
            for rank in list(waiting):
                if store.check([_key(rank, number)]):
                    said[rank] = store.get(_key(rank, number)).decode()
                    waiting.remove(rank)
            time.sleep(0.05)
        return waiting, said
    except RuntimeError:  # the store has gone with the rank that held it
        return [], {}
    finally:
        store.set_timeout(before)


def leave_word(me: int, number: int, text: str) -> None:
    """Tell the others why this rank does not take part in exchange `number`."""
    store = store_of_all()
    if store is not None:
        try:
            store.set(_key(me, number), text)
        except RuntimeError:
            return


def _key(rank: int, number: int) -> str:
    return f"mts_fast/exchange/{number}/{rank}"


def store_of_all() -> dist.Store | None:
    """The store that the process group was made with; None without one."""
    try:
        store: dist.Store = dist.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
    return store


def is_communication(error: BaseException) -> bool:
    """Whether an error is of an exchange that broke off: NCCL's have a class, gloo's a path."""
    return isinstance(error, dist.DistBackendError) or "/gloo/" in str(error)
