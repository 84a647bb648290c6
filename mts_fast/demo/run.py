"""Runs the demo over seeds in parallel processes; writes table, JSON and pictures."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mts_fast._files import replaced_file, writing
from mts_fast._outputs import output_folder
from mts_fast.demo.arms import ARMS, SeedResult, run_seed
from mts_fast.demo.classifiers import SETTINGS, Settings
from mts_fast.demo.figures import draw_figures
from mts_fast.demo.tables import plus_minus, print_table
from mts_fast.demo.workers import run_seeds, tell

# steps reported to the progress bar at once
REPORT_EVERY = 20


def run_demo(
    data: str, seeds: Sequence[int], out: Path, root: str | None, steps: int | None
) -> list[SeedResult]:
    """Train all arms for all seeds, fill `out` and print the table."""
    settings = SETTINGS[data]
    if steps is not None:
        settings = Settings(**{**asdict(settings), "steps": steps})
    with output_folder("demo", "--out", out):
        results = _train(data, seeds, root, settings)
        rows = summarize(results)
        record = {
            "data": data,
            "seeds": list(seeds),
            "settings": asdict(settings),
            "machine": machine(),
            "summary": rows,
            "runs": [
                {k: v for k, v in asdict(r).items() if k not in ("weights", "curves")}
                for r in results
            ],
        }
        console = Console()
        try:
            save_record(record, out)
            pictures = draw_figures(data, results, root, out)
        finally:  # where the disk has filled up meanwhile, the table is the only output
            print_table(console, *render(data, rows, len(seeds), plus_minus(console)))
            _explain(console, rows)
    names = ", ".join(["results.json", *(path.name for path in pictures)])
    console.print(f"Written to {out}/: {names}", markup=False)
    return results


def save_record(record: dict[str, Any], out: Path) -> None:
    """Write results.json, whole or not at all."""
    path = out / "results.json"
    with replaced_file("demo", path) as part, writing("demo", path):
        part.write_text(json.dumps(record, indent=1) + "\n")


def _train(
    data: str, seeds: Sequence[int], root: str | None, settings: Settings
) -> list[SeedResult]:
    """One process per core; each works through whole seeds with one thread."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        total = len(ARMS) * settings.steps
        tasks = {s: bars.add_task(f"seed {s}: waiting", total=total) for s in seeds}

        def report(seed: int, arm: str, steps: int) -> None:
            bars.update(tasks[seed], advance=steps, description=f"seed {seed}: {arm:<30}")

        def ended(seed: int, well: bool) -> None:
            if well:
                bars.update(tasks[seed], completed=total, description=f"seed {seed}: done")
            else:
                bars.update(tasks[seed], description=f"seed {seed}: failed")

        return run_seeds(partial(_work, data, root, settings), seeds, report, ended)


def _work(data: str, root: str | None, settings: Settings, seed: int) -> SeedResult:
    torch.set_num_threads(1)
    counted = 0

    def report(arm: str, steps: int) -> None:
        nonlocal counted
        counted += steps
        if counted >= REPORT_EVERY:
            tell(seed, arm, counted)
            counted = 0

    return run_seed(data, seed, root, settings, report)


def summarize(results: Sequence[SeedResult]) -> dict[str, dict[str, float | None]]:
    """By arm: mean and sample deviation of accuracy (percent), of AUC, and mean seconds."""

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    rows: dict[str, dict[str, float | None]] = {}
    for arm in ARMS:
        accuracies = [100 * r.accuracy[arm] for r in results]
        auc = [r.auc[arm] for r in results if arm in r.auc]
        rows[arm] = {
            "accuracy": statistics.mean(accuracies),
            "accuracy_spread": spread(accuracies),
            "auc": statistics.mean(auc) if auc else None,
            "auc_spread": spread(auc) if auc else None,
            "seconds": statistics.mean(r.seconds[arm] for r in results),
        }
    return rows


def render(
    data: str, rows: dict[str, dict[str, float | None]], seeds: int, sign: str
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table; `sign` stands between a mean and its spread."""
    lines = []
    for arm, row in rows.items():
        auc = "" if row["auc"] is None else f"{row['auc']:.2f} {sign} {row['auc_spread']:.2f}"
        accuracy = f"{row['accuracy']:.1f} {sign} {row['accuracy_spread']:.1f}"
        lines.append([arm, accuracy, auc, f"{row['seconds']:.1f}"])
    columns = ["trained on", "test accuracy %", "AUC of weights", "seconds"]
    return f"{data}: mean and spread over {seeds} seeds", columns, lines


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
    """The machine of the run."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
