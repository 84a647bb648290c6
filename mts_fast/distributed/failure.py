"""Errors that ranks tell each other, and what is raised where one of them has failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from mts_fast.hypergradient import Refused

MOST_CHARACTERS = 2000  # of an error's text that other ranks are told


@dataclass(frozen=True)
class Failure:
    """An error as other ranks see it; `refused` holds the engine and its reasons."""

    kind: str
    text: str
    refused: tuple[str, tuple[str, ...], bool] | None = None

    @classmethod
    def of(cls, error: Exception | None) -> Failure | None:
        """What to tell of an error."""
        if error is None:
            return None
        refused = None
        if isinstance(error, Refused) and error.reasons:
            refused = error.engine, tuple(map(str, error.reasons)), error.final
        return cls(type(error).__name__, str(error)[:MOST_CHARACTERS], refused)


class FailedElsewhere(RuntimeError):
    """Another rank is why this one cannot go on.

    `rank` and `text` are its number and error, where they are known.
    """

    def __init__(self, message: str, rank: int | None = None, text: str = "") -> None:
        super().__init__(message)
        self.rank, self.text = rank, text


def raise_first(
    op: str, failures: Sequence[Failure | None], index: int, error: Exception | None
) -> None:
    """Raise where a rank has failed: this rank its own error, the others what they were told.

    An engine that one rank refuses is refused on all, so that they go on to the same next one.

    Raises:
        Exception: this rank's own error.
        Refused: some rank's engine cannot serve, and nothing worse has happened.
        FailedElsewhere: another rank has failed; its number and its error are named.
    """
    failed = {rank: f for rank, f in enumerate(failures) if f is not None}
    if not failed:
        return
    worse = {rank: f for rank, f in failed.items() if f.refused is None}
    if not worse:
        _raise_refused(failed, index, error)
    if error is not None and index in worse:
        others = ", ".join(str(rank) for rank in worse if rank != index)
        if others:
            error.add_note(f"{op}: so have ranks {others}")
        raise error
    rank, first = next(iter(worse.items()))
    raise FailedElsewhere(
        f"{op}: the call must be complete on every rank, got {first.kind} on rank {rank}:"
        f" {first.text}; nothing has changed on any rank, the next call may be made",
        rank,
        first.text,
    ) from error


def _raise_refused(failed: dict[int, Failure], index: int, error: Exception | None) -> NoReturn:
    refusals = [(rank, f.refused) for rank, f in failed.items() if f.refused is not None]
    if isinstance(error, Refused):
        raise error
    engine, _, final = refusals[0][1]
    reasons = [f"rank {rank}: {r}" for rank, (_, reasons, _) in refusals for r in reasons]
    raise Refused(engine, reasons, final=final)


def raise_lost(op: str, lost: str, cause: Exception | None = None) -> NoReturn:
    """Raise where ranks wait for one that does not come."""
    raise FailedElsewhere(
        f"{op}: every rank must be in the call, got {lost}; the process group is broken:"
        " start the ranks again from the last checkpoint"
    ) from cause


def out_of_step(op: str) -> ValueError:
    """The error of ranks that are in different places."""
    return ValueError(
        f"{op}: calls must be in step on all ranks, got one that begins where another goes on; give"
        " every rank the same accumulate= and as many calls"
    )
