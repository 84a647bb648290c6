"""`--study batch-size`: GSNR of the selector's gradient against the selector batch, on real data.

The paper's central claim: small batches give no usable meta-gradient. All parameters stay fixed in
mid-training; only the batch is drawn again.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from mts_fast._outputs import output_folder
from mts_fast.demo.classifiers import SETTINGS, train_weighted
from mts_fast.demo.figures import draw_batch_size_study
from mts_fast.demo.run import machine, save_record
from mts_fast.demo.scenario import Scenario, make_scenario
from mts_fast.demo.selection import MTSRun, pool_features
from mts_fast.demo.tables import print_table
from mts_fast.diagnostics import GSNRMeter
from mts_fast.features import ForgettingCounter

BATCH_SIZES = (16, 32, 64, 128, 256, 512, 1024)
DRAWS = 32
# where training is stopped and the parameters are held
STOP_SHARE = 0.4


def run_batch_size_study(data: str, seed: int, out: Path, root: str | None) -> list[dict]:
    """Train to mid-way, then measure; writes results.json and gsnr_by_batch_size.png."""
    with output_folder("demo", "--out", out):
        progress = Console(stderr=True)
        scenario = make_scenario(data, seed, root)
        run = _mid_training(scenario, data, seed, progress)
        generator = torch.Generator().manual_seed(seed)
        sizes = track(BATCH_SIZES, "measuring", console=progress)
        rows = [_measure(run, size, generator) for size in sizes]
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
            save_record(record, out)
            picture = draw_batch_size_study(rows, data, out / "gsnr_by_batch_size.png")
        finally:  # where the disk has filled up meanwhile, the table is the only output
            print_table(console, *_table(data, rows))
    console.print(f"Written to {out}/: results.json, {picture.name}", markup=False)
    return rows


def _table(data: str, rows: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    title = f"{data}: GSNR of the selector gradient, {DRAWS} draws, parameters fixed"
    columns = ["selector batch", "GSNR over draws", "GSNR within one batch (mean)"]
    values = [
        [str(r["batch_size"]), f"{r['gsnr_over_draws']:.3f}", f"{r['gsnr_within_batch']:.3f}"]
        for r in rows
    ]
    return title, columns, values


def _mid_training(scenario: Scenario, data: str, seed: int, console: Console) -> MTSRun:
    settings = SETTINGS[data]

    def silent(_: int) -> None:
        """No progress bar of its own."""

    with console.status("training to mid-way"):
        counter = ForgettingCounter(len(scenario.pool))
        unselected = train_weighted(scenario.pool, settings, seed, silent, counter=counter)
        table = pool_features(scenario, unselected, counter)
        run = MTSRun.with_features(scenario, table, settings, seed, track_gsnr=True)
        run.train(silent, stop=round(STOP_SHARE * settings.steps))
    return run


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
