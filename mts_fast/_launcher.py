"""What a launcher (torchrun, accelerate) tells its processes. Nothing here imports torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
TIMEOUT = "MTS_FAST_TIMEOUT"
# the first rank may read and decode for hours while the others wait
MINUTES = 24 * 60
HINT = "start the command by torchrun, or unset RANK and WORLD_SIZE for a process by itself"


@dataclass(frozen=True)
class Place:
    """This process among those that were started together; on its host they have local numbers."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1


def place(*, shared: bool = True) -> Place:
    """The place of this process: the only one where no launcher has started it.

    shared: whether the processes are to work together; else only its number is asked for.

    Raises:
        ValueError: variables that are no whole numbers, do not fit together, or are missing.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Place()
    # some schedulers tell no local numbers
    names = NAMES if shared or all(name in os.environ for name in NAMES) else NAMES[:2]
    numbers = [_number(name, os.environ.get(name)) for name in names]
    here = Place(*numbers)
    if not shared:
        return here
    if not here.rank < here.ranks or not here.local_rank < here.local_ranks <= here.ranks:
        got = ", ".join(f"{name}={number}" for name, number in zip(NAMES, numbers, strict=True))
        raise ValueError(
            f"launcher: RANK must be below WORLD_SIZE, also locally, got {got}; {HINT}"
        )
    missing = [name for name in ADDRESS if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"launcher: {' and '.join(missing)} must be set beside RANK, got nothing; {HINT}"
        )
    return here


def timeout_minutes() -> float:
    """How long a rank waits for another one.

    Raises:
        ValueError: MTS_FAST_TIMEOUT is no number above 0.
    """
    text = os.environ.get(TIMEOUT, str(MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(
            f"launcher: {TIMEOUT} must be a number of minutes above 0, got {text!r}; unset it for"
            f" {MINUTES}"
        )
    return minutes


def _number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise ValueError(
            f"launcher: {name} must be a whole number beside RANK, got {text!r}; {HINT}"
        )
    return int(text)
