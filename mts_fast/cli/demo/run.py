"""Runs the demo over seeds in parallel processes; writes table, JSON and pictures."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import queue
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mts_fast.cli.demo.arms import ARMS, SeedResult, run_seed
from mts_fast.cli.demo.classifiers import SETTINGS, Settings
from mts_fast.cli.demo.figures import draw_figures

# steps reported to the progress bar at once
REPORT_EVERY = 20


def run_demo(
    data: str, seeds: Sequence[int], out: Path, root: str | None, steps: int | None
) -> list[SeedResult]:
    """Train all arms for all seeds, print the table and fill `out`."""
    console = Console()
    settings = SETTINGS[data]
    if steps is not None:
        settings = Settings(**{**asdict(settings), "steps": steps})
    results = _train(data, seeds, root, settings, console)
    rows = summarize(results)
    console.print(render(data, rows, len(seeds)))
    _explain(console, rows)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "data": data,
        "seeds": list(seeds),
        "settings": asdict(settings),
        "machine": machine(),
        "summary": rows,
        "runs": [
            {k: v for k, v in asdict(r).items() if k not in ("weights", "curves")} for r in results
        ],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    pictures = draw_figures(data, results, root, out)
    console.print(f"Written to {out}/: results.json, " + ", ".join(p.name for p in pictures))
    return results


def _train(
    data: str, seeds: Sequence[int], root: str | None, settings: Settings, console: Console
) -> list[SeedResult]:
    """One process per core; each works through whole seeds with one thread."""
    context = multiprocessing.get_context("spawn")
    workers = min(len(seeds), os.cpu_count() or 1)
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
        ) as bars,
    ):
        messages = manager.Queue()
        futures = [pool.submit(_work, data, s, root, settings, messages) for s in seeds]
        total = len(ARMS) * settings.steps
        tasks = {s: bars.add_task(f"seed {s}: waiting", total=total) for s in seeds}
        while not all(f.done() for f in futures):
            try:
                seed, arm, taken = messages.get(timeout=0.2)
            except queue.Empty:
                continue
            bars.update(tasks[seed], advance=taken, description=f"seed {seed}: {arm:<30}")
        for seed, task in tasks.items():
            bars.update(task, completed=total, description=f"seed {seed}: done")
        return [f.result() for f in futures]


def _work(data: str, seed: int, root: str | None, settings: Settings, messages: Any) -> SeedResult:
    torch.set_num_threads(1)
    counted = 0

    def report(arm: str, steps: int) -> None:
        nonlocal counted
        counted += steps
        if counted >= REPORT_EVERY:
            messages.put((seed, arm, counted))
            counted = 0

    return run_seed(data, seed, root, settings, report)


def summarize(results: Sequence[SeedResult]) -> dict[str, dict[str, float | None]]:
    """By arm: mean and sample deviation of accuracy (percent), of AUC, and mean seconds."""

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    rows: dict[str, dict[str, float | None]] = {}
    for arm in ARMS:
        found = [100 * r.accuracy[arm] for r in results]
        auc = [r.auc[arm] for r in results if arm in r.auc]
        rows[arm] = {
            "accuracy": statistics.mean(found),
            "accuracy_spread": spread(found),
            "auc": statistics.mean(auc) if auc else None,
            "auc_spread": spread(auc) if auc else None,
            "seconds": statistics.mean(r.seconds[arm] for r in results),
        }
    return rows


def render(data: str, rows: dict[str, dict[str, float | None]], seeds: int) -> Table:
    """The table for the terminal."""
    table = Table(title=f"{data}: mean and spread over {seeds} seeds")
    table.add_column("trained on")
    for column in ("test accuracy %", "AUC of weights", "seconds"):
        table.add_column(column, justify="right")
    for arm, row in rows.items():
        auc = "" if row["auc"] is None else f"{row['auc']:.2f} ± {row['auc_spread']:.2f}"
        accuracy = f"{row['accuracy']:.1f} ± {row['accuracy_spread']:.1f}"
        table.add_row(arm, accuracy, auc, f"{row['seconds']:.1f}")
    return table


def _explain(console: Console, rows: dict[str, dict[str, float | None]]) -> None:
    gain = _value(rows, "MTS") - _value(rows, "all, unweighted")
    fair = _value(rows, "MTS weights, retrained") - _value(rows, "real + validation")
    console.print(
        f"MTS against training on everything alike: {gain:+.1f} points. Retrained with its weights "
        f"against real + validation data alone (the fair control): {fair:+.1f} points."
    )


def _value(rows: dict[str, dict[str, float | None]], arm: str) -> float:
    return rows[arm]["accuracy"] or 0.0


def machine() -> dict[str, str | int | None]:
    """What the run was made on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
