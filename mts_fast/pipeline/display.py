"""How far a run is: bars with the time left, or lines where no one watches a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mts_fast.pipeline.data.findings import counted

WHOLE = "whole run"


class Display:
    """Bars of the stages and of the whole run; `progress` is rich's, a context."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._epochs: dict[str, int] = {}
        self._costs: dict[str, float] = {}
        self._done: dict[str, float] = {}  # of the costs, by stage
        self._began: tuple[float, float] | None = None  # time and cost done, at the first epoch

    def expect(self, stages: Mapping[str, int], factors: Mapping[str, float]) -> None:
        """The stages to come, epochs of each, and what an epoch costs beside one plain epoch."""
        self._epochs = dict(stages)
        self._costs = {name: factors.get(name, 1.0) for name in stages}
        total = sum(self._epochs[name] * self._costs[name] for name in stages)
        self._tasks[WHOLE] = self.progress.add_task(WHOLE, total=round(total), note="")

    def advance(self, stage: str, epoch: int, speed: float) -> None:
        """An epoch of a stage is done; `speed` in samples a second."""
        if stage not in self._tasks:
            total = self._epochs[stage]
            self._tasks[stage] = self.progress.add_task(stage, total=total, note="")
        self.progress.update(self._tasks[stage], completed=epoch, note=f"{speed:,.0f} samples/s")
        self._set(stage, epoch)
        if not self.console.is_terminal and epoch == self._epochs[stage]:
            line = f"{stage}: {counted(epoch, 'epoch')}, {speed:,.0f} samples/s{self._left()}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def finished(self, stage: str) -> None:
        """A stage is done, or was there from an earlier run; some have no epochs."""
        if stage in self._epochs:
            self._set(stage, self._epochs[stage])

    def _set(self, stage: str, epoch: int) -> None:
        self._done[stage] = epoch * self._costs[stage]
        done = sum(self._done.values())
        self.progress.update(self._tasks[WHOLE], completed=round(done))
        if self._began is None:
            self._began = time.monotonic(), done

    def _left(self) -> str:
        """An estimate of the time left, in words."""
        total = sum(self._epochs[name] * self._costs[name] for name in self._epochs)
        assert self._began is not None
        began, before = self._began
        done = sum(self._done.values())
        if done <= before or done >= total:
            return ""
        seconds = (time.monotonic() - began) / (done - before) * (total - done)
        return f"; about {seconds / 60:.1f} min left"
