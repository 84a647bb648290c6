"""A command that a launcher has started several times: its process group, and its one voice."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mts_fast._launcher import Place
from mts_fast._process import postponed

if TYPE_CHECKING:
    import torch.distributed as dist

# verbs whose work ranks share; the others run on the first rank alone
SHARED = ("train", "features", "score")
# how long the first rank looks for another one's error, and the others for its line
PATIENCE = 10.0  # seconds
TOLD = "mts_fast/told"


def is_shared(verb: str, words: Sequence[str]) -> bool:
    """Whether all ranks run a command line, or the first one does."""
    return verb in SHARED and "--help" not in words


class Voice:
    """Tells why a command ends: each error once, whichever rank has met it."""

    def __init__(self, name: str, one_line: Callable[[Exception], str]) -> None:
        self.name = name
        self.one_line = one_line  # what is said of an error
        self.rank = 0
        self.store: dist.Store | None = None

    @contextmanager
    def joined(self, place: Place) -> Iterator[None]:
        """Inside, all ranks of the launcher form a process group."""
        from mts_fast.distributed.launch import process_group
        from mts_fast.distributed.lost import store_of_all

        self.rank = place.rank
        with process_group(place):
            self.store = store_of_all()
            self.ranks = range(place.ranks)
            yield

    def say(self, line: str, error: Exception | None = None) -> None:
        """Print a line, of an error where there is one; the group has ended by now."""
        with postponed():
            if self.store is None:
                self._print(line)
            elif self.rank == 0:
                self._print(self._of_another(error) or line)
                _put(self.store, TOLD, "yes")
            else:
                if not _is_elsewhere(error):
                    _put(self.store, _key(self.rank), line)
                if _wait(lambda: _get(self.store, TOLD)) is None:
                    self._print(f"rank {self.rank}: {line}")

    def interrupted(self) -> None:
        """Say so on the first rank: all have been, or one has died, as the launcher says."""
        with postponed():
            if self.rank == 0:
                self._print("interrupted")

    def _of_another(self, error: Exception | None) -> str:
        """What to say where another rank is the cause."""
        if not _is_elsewhere(error):
            return ""
        rank, text = error.rank, error.text  # type: ignore[union-attr]
        if rank is not None:
            return f"rank {rank}: {self.one_line(type(error)(text))}"  # type: ignore[misc]

        def told() -> str | None:
            lines = {rank: _get(self.store, _key(rank)) for rank in self.ranks}
            return next((f"rank {rank}: {line}" for rank, line in lines.items() if line), None)

        return _wait(told) or ""

    def _print(self, line: str) -> None:
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)


def _is_elsewhere(error: Exception | None) -> bool:
    from mts_fast.distributed.failure import FailedElsewhere

    return isinstance(error, FailedElsewhere)


def _key(rank: int) -> str:
    return f"mts_fast/error/{rank}"


def _put(store: dist.Store, key: str, text: str) -> None:
    try:
        store.set(key, text)
    except RuntimeError:  # the store has gone with the process that held it
        return


def _get(store: dist.Store | None, key: str) -> str | None:
    """A word that was left; "gone" where nobody holds the store any more."""
    assert store is not None
    try:
        return store.get(key).decode() if store.check([key]) else None
    except RuntimeError:
        return "gone"


def _wait(look: Callable[[], str | None]) -> str | None:
    """What `look` sees first, for some time."""
    deadline = time.monotonic() + PATIENCE
    while (seen := look()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return seen
