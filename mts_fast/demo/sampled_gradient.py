"""`--study sampled-gradient`: quality of both gradients by cost, of exact and of sampled steps.

All parameters stay fixed in mid-training; the batch and the draw are made again and again.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mts_fast._outputs import output_folder
from mts_fast.demo.arms.learned import MTSRun
from mts_fast.demo.gsnr import STOP_SHARE, mid_training
from mts_fast.demo.run import machine
from mts_fast.demo.store import save_json
from mts_fast.demo.tables import print_table
from mts_fast.demo.training import SETTINGS
from mts_fast.diagnostics import GSNRMeter

# batches, and how many of their samples are computed; None: all
STEPS = (
    *((1024, None), (512, None), (256, None), (128, None)),
    *((1024, 256), (1024, 128), (1024, 64), (512, 128), (512, 64)),
)
DRAWS = 64


def run_gradient_study(
    data: str,
    seed: int,
    out: Path,
    root: str | None,
    steps: tuple[tuple[int, int | None], ...] = STEPS,
) -> list[dict[str, float | int | None]]:
    """Train to mid-way, then measure; writes results.json."""
    with output_folder("demo", "--out", out):
        progress = Console(stderr=True)
        run = mid_training(data, seed, root, progress)
        measured = [
            _measure(run, *sizes, torch.Generator().manual_seed(seed))
            for sizes in track(steps, "measuring", console=progress)
        ]
        # the expected gradient, as the mean over the draws of the first row, the largest batch
        expected = measured[0][1].mean(0)
        size = expected.square().sum()
        rows = []
        for row, gradients in measured:
            error = (gradients - expected).square().sum(1).mean() / size
            rows.append({**row, "classifier_error": float(error)})
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
        finally:  # where the disk has filled up meanwhile, the table is the only output
            print_table(console, *_table(data, rows))
    console.print(f"Written to {out}/: results.json", markup=False)
    return rows


def _table(
    data: str, rows: list[dict[str, float | int | None]]
) -> tuple[str, list[str], list[list[str]]]:
    title = f"{data}: gradients of {DRAWS} draws, parameters fixed"
    columns = ["batch", "computed", "cost", "GSNR of the selector's", "error of the classifier's"]
    keys = ("gsnr", "classifier_error")
    return (
        title,
        columns,
        [
            [
                str(row["candidates"]),
                "all" if row["computed"] is None else str(row["computed"]),
                str(row["cost"]),
                *(f"{row[key]:.2f}" for key in keys),
            ]
            for row in rows
        ],
    )


def _measure(
    run: MTSRun, size: int, computed: int | None, generator: torch.Generator
) -> tuple[dict[str, float | int | None], Tensor]:
    """GSNR of the selector's gradient over draws, and the classifier's gradients [DRAWS, P].

    The cost counts forwards of one sample, without validation: 5 of a computed one, 1 of a
    candidate of a sampled step.
    """
    run.step.track_gsnr = False
    state = copy.deepcopy(run.step.state_dict())
    meter, gradients = GSNRMeter(), []
    for _ in range(DRAWS):
        run.step.compute = computed
        indices = torch.randperm(len(run.scenario.pool), generator=generator)[:size]
        run.take_step(indices)
        meter.update([p.grad for p in run.step.selector.parameters() if p.grad is not None])
        parts = [p.grad.flatten() for p in run.step.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
        run.step.load_state_dict(state)
    run.step.compute = None
    row: dict[str, float | int | None] = {
        "candidates": size,
        "computed": computed,
        "cost": 5 * size if computed is None else size + 5 * computed,
        "gsnr": float(meter.value()),
    }
    return row, torch.stack(gradients)
