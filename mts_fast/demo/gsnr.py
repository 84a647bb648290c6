"""`--study gsnr`: GSNR of the selector's gradient against the selector batch, on real data.

The paper's central claim: small batches give no usable meta-gradient. All parameters stay fixed in
mid-training; only the batch is drawn again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from mts_fast._outputs import output_folder
from mts_fast.demo.arms.learned import MTSRun, pool_features
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import make_scenario
from mts_fast.demo.figures import draw_gsnr
from mts_fast.demo.options import options_of
from mts_fast.demo.run import machine
from mts_fast.demo.store import save_json
from mts_fast.demo.tables import print_table
from mts_fast.demo.training import SETTINGS, epochs
from mts_fast.diagnostics import GSNRMeter

BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
DRAWS = 32
# where training is stopped and the parameters are held
STOP_SHARE = 0.4


def run_gsnr_study(
    data: str, seed: int, out: Path, root: str | None, sizes: Sequence[int] = BATCH_SIZES
) -> list[dict[str, float]]:
    """Train to mid-way, then measure; writes results.json and gsnr_by_batch_size.png."""
    with output_folder("demo", "--out", out):
        progress = Console(stderr=True)
        run = mid_training(data, seed, root, progress)
        generator = torch.Generator().manual_seed(seed)
        measured = track(sizes, "measuring", console=progress)
        rows = [_measure(run, size, generator) for size in measured]
        record = {
            "data": data,
            "seed": seed,
            "draws": DRAWS,
            "stop_share": STOP_SHARE,
            "settings": asdict(SETTINGS[data]),
            "machine": machine(),
            "rows": rows,
        }
        console = Console()
        try:
            save_json(out / "results.json", record, indent=1)
            picture = draw_gsnr(rows, data, out / "gsnr_by_batch_size.png")
        finally:  # where the disk has filled up meanwhile, the table is the only output
            print_table(console, *_table(data, rows))
    console.print(f"Written to {out}/: results.json, {picture.name}", markup=False)
    return rows


def _table(data: str, rows: list[dict[str, float]]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    title = f"{data}: GSNR of the selector gradient, {DRAWS} draws, parameters fixed"
    columns = ["selector batch", "GSNR over draws", "GSNR within one batch (mean)"]
    values = [
        [str(r["batch_size"]), f"{r['gsnr_over_draws']:.3f}", f"{r['gsnr_within_batch']:.3f}"]
        for r in rows
    ]
    return title, columns, values


def mid_training(data: str, seed: int, root: str | None, console: Console) -> MTSRun:
    """A run of MTS, held after STOP_SHARE of its steps."""
    with console.status("training to mid-way"):
        settings = SETTINGS[data]
        run = SeedRun(make_scenario(data, seed, root), settings, seed)
        options = options_of(data, "MTS weights")
        learner = MTSRun.with_features(run, pool_features(run, options), options)
        batches = epochs(len(run.scenario.pool), settings, torch.Generator().manual_seed(seed))
        for indices in islice(batches, round(STOP_SHARE * settings.steps)):
            learner.take_step(indices)
            learner.schedule.step()
    return learner


def _measure(run: MTSRun, size: int, generator: torch.Generator) -> dict[str, float]:
    """Gradients of DRAWS batches of one size, every time from the same state."""
    run.step.track_gsnr = True
    state = copy.deepcopy(run.step.state_dict())
    over, within = GSNRMeter(), []
    for _ in range(DRAWS):
        indices = torch.randperm(len(run.scenario.pool), generator=generator)[:size]
        result = run.take_step(indices)
        over.update([p.grad for p in run.step.selector.parameters() if p.grad is not None])
        if result.gsnr is not None:
            within.append(float(result.gsnr))
        run.step.load_state_dict(state)
    return {
        "batch_size": size,
        "gsnr_over_draws": float(over.value()),
        "gsnr_within_batch": sum(within) / len(within),
    }
