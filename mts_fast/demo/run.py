"""Runs the comparison over seeds in parallel processes; writes table, JSON and pictures."""

from __future__ import annotations

import importlib.resources
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mts_fast._outputs import output_folder
from mts_fast.demo.figures import draw_figures
from mts_fast.demo.jobs import Job, JobResult, available_arms, missing_packages, train_job
from mts_fast.demo.options import OPTIONS
from mts_fast.demo.store import FOLDER, load_result, save_json, save_result
from mts_fast.demo.summary import OURS, WITHOUT, cell, strongest_baseline, summarize
from mts_fast.demo.tables import plus_minus, print_table
from mts_fast.demo.training import SETTINGS
from mts_fast.demo.workers import run_tasks, tell

# summaries of ten fresh seeds, made by `make evidence`
COMMITTED = "committed.json"


def run_demo(
    data: str, seeds: Sequence[int], out: Path, root: str | None, steps: int | None
) -> list[JobResult]:
    """Train all arms for all seeds, fill `out` and print the table; finished seeds are reused."""
    changed: dict[str, Any] = {} if steps is None else {"steps": steps}
    arms = available_arms(data)
    jobs = [Job(data, seed, arms, root=root, settings=changed) for seed in seeds]
    with output_folder("demo", "--out", out):
        results = run_jobs(jobs, out)
        rows = summarize(results)
        settings = replace(SETTINGS[data], **changed)
        record = {
            "data": data,
            "seeds": list(seeds),
            "settings": asdict(settings),
            "options": OPTIONS.get(data, {}),
            "machine": machine(),
            "summary": rows,
            "runs": [_without_pools(result) for result in results],
        }
        console = Console()
        try:
            save_json(out / "results.json", record, indent=1)
            pictures = draw_figures(data, results, rows, root, out)
        finally:  # where the disk has filled up meanwhile, the table is the only output
            committed = None if steps else committed_rows(data)
            print_table(console, *render(data, rows, len(seeds), plus_minus(console), committed))
            _explain(console, rows)
    names = ", ".join(["results.json", *(path.name for path in pictures)])
    console.print(f"Written to {out}/: {names}", markup=False)
    return results


def run_jobs(jobs: Sequence[Job], out: Path) -> list[JobResult]:
    """The results of jobs in order: of an earlier run where it finished them, else trained here,
    one process per core and one thread each, and saved as each job ends."""
    results = {job.name: result for job in jobs if (result := load_result(out, job)) is not None}
    left = [job for job in jobs if job.name not in results]
    errors = Console(stderr=True)
    if results:
        errors.print(
            f"{len(results)} of {len(jobs)} were finished by an earlier run"
            f" (delete {out / FOLDER} to train them again)",
            soft_wrap=True,
        )
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    with Progress(*columns, console=errors) as bars:
        tasks = {
            job.name: bars.add_task(f"{job.name}: waiting", total=len(job.arms)) for job in left
        }
        started = dict.fromkeys(tasks, 0)

        def report(job: Job, arm: str) -> None:
            bars.update(
                tasks[job.name],
                completed=started[job.name],
                description=f"{job.name}: {arm:<38}",
            )
            started[job.name] += 1

        def ended(job: Job, well: bool) -> None:
            if well:
                bars.update(tasks[job.name], completed=len(job.arms))
            bars.update(tasks[job.name], description=f"{job.name}: {'done' if well else 'failed'}")

        trained = run_tasks(partial(_work, str(out)), left, report, ended)
    results |= {job.name: result for job, result in zip(left, trained, strict=True)}
    return [results[job.name] for job in jobs]


def _work(out: str, job: Job) -> JobResult:
    torch.set_num_threads(1)
    result = train_job(job, lambda arm: tell(job, arm))
    save_result(Path(out), job, result)
    return result


def _without_pools(result: JobResult) -> dict[str, Any]:
    """A result without what has an entry for every sample or step."""
    return {k: v for k, v in asdict(result).items() if k not in ("weights", "curves")}


def committed_rows(data: str) -> dict[str, dict[str, Any]] | None:
    """The committed summary of ten fresh seeds; None of data that has none."""
    path = importlib.resources.files("mts_fast.demo").joinpath(COMMITTED)
    try:
        return json.loads(path.read_text()).get(data)
    except FileNotFoundError:
        return None


def render(
    data: str,
    rows: dict[str, dict[str, Any]],
    seeds: int,
    sign: str,
    committed: dict[str, dict[str, Any]] | None = None,
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table; `sign` stands between a mean and its error."""
    columns = ["trained on", "test accuracy %", "worst group %", "AUC of weights"]
    columns += [f"{OURS} ahead by", "seconds"]
    if committed is not None:
        columns.append("published, 10 seeds")
    lines = []
    for arm, row in rows.items():
        line = [arm, cell(row, "accuracy", sign), cell(row, "worst_group", sign)]
        line.append(cell(row, "auc", sign, digits=2))
        line += [cell(row, "ahead", sign), f"{row['seconds']:.1f}"]
        if committed is not None:
            line.append(cell(committed[arm], "accuracy", sign) if arm in committed else "")
        lines.append(line)
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    title = f"{data}: mean and standard error of {seeds} seeds"
    return title, [columns[i] for i in used], [[line[i] for i in used] for line in lines]


def _explain(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    if OURS not in rows:
        return
    for what, arm in (
        ("the strongest baseline of this run", strongest_baseline(rows)),
        ("its own recipe with a classifier of clean data in place of MTS", WITHOUT),
        ("training", "everything alike"),
    ):
        console.print(f"{OURS}: {rows[arm]['ahead']:+.1f} points against {what} ({arm})")
    for arm, package in missing_packages().items():
        # markup=False: rich would read the extra's brackets as markup and print nothing
        console.print(
            f"left out, needs {package}: {arm} (pip install 'mts_fast[evidence]')", markup=False
        )


def machine() -> dict[str, str | int | None]:
    """The machine of the run."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
