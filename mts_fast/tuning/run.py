"""Times what was recorded and writes the verdicts, one after the other, so that none is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mts_fast._check import fail
from mts_fast.backends.verdicts import table
from mts_fast.backends.verdicts.environment import environment
from mts_fast.backends.verdicts.requests import Request
from mts_fast.backends.verdicts.table import Verdict
from mts_fast.tuning.judge import Timer, judge
from mts_fast.tuning.timing import on_device

OP = "tune"


@dataclass(frozen=True)
class Judged:
    """A verdict as it was made or read, or why there is none."""

    request: Request
    backend: str
    verdict: Verdict | None
    why: str = ""
    old: bool = False  # it was there before


def path_for(device: torch.device) -> Path:
    """The file of verdicts for a device of this machine.

    Raises:
        RuntimeError: MTS_FAST_VERDICTS is "off".
    """
    path = table.path_of(environment(device))
    if path is None:
        expected = "'cached' or a path"
        fail(RuntimeError, OP, table.VARIABLE, expected, "'off'", f"unset {table.VARIABLE}")
    return path


def tune(
    requests: Iterable[Request],
    device: torch.device,
    *,
    again: bool = False,
    timer: Timer = on_device,
) -> Iterator[Judged]:
    """Time every request for which the file has no verdict, and add it to the file at once.

    Args:
        requests: as recorded; those for another type of device are left out, and of those that
            share a key the first is timed.
        device: to time on.
        again: time and replace verdicts that are there.
        timer: seconds of calls in turns; `on_device` by default.

    Returns:
        An iterator of what was judged, as soon as it is.

    Raises:
        OSError: the file cannot be written.
        ValueError: it is of another environment.

    Notes:
        A process that has chosen already keeps its choices: verdicts hold from its next start on.
    """
    here, path = environment(device), path_for(device)
    present = table.to_extend(path, here) or {}
    done: set[str] = set()
    for request in requests:
        key = request.key
        if request.device != device.type or key in done:
            continue
        done.add(key)
        old = {
            backend: verdict
            for name, verdict in present.items()
            for known, _, backend in [name.rpartition(" | ")]
            if known == key
        }
        if old and not again:
            yield from (Judged(request, b, verdict, old=True) for b, verdict in old.items())
            continue
        try:
            made = judge(request, device, timer)
        # a kernel that does not compile here, memory that is not enough: no verdict, and go on.
        # What is raised depends on the compiler
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            yield Judged(request, "", None, f"{type(error).__name__}: {first}")
            continue
        believed = {table.name_of(request, b): v for b, v in made.items() if v["wins"] is not None}
        if believed:
            table.add(path, here, believed, again=again)
        for backend, verdict in made.items():
            sure = verdict["wins"] is not None
            why = "" if sure else f"times spread by {100 * verdict['spread']:.0f} %"
            yield Judged(request, backend, verdict if sure else None, why)
