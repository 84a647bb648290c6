"""Adapters on two processes, by the launchers that their libraries have: one process's losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_pool import SLOW

SCRIPT = Path(__file__).parents[1] / "helpers" / "run_adapter.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# in float32; observed: 1.6e-6 after six steps of the Trainer, 2e-7 of accelerate's loop
TOLERANCE = 5e-6


def losses(name, folder, launcher, **variables):
    """Of each process."""
    result = folder / f"{name}-{len(launcher)}-{len(variables)}"
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "STEPS": "4", **variables}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), name, str(result)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted(folder.glob(f"{result.name}.*"))
    return [json.loads(file.read_text()) for file in files]


@SLOW
@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("accelerate_loop", ["accelerate", "sklearn"]),
        ("hf_trainer", ["accelerate", "transformers"]),
        ("lightning_module", ["lightning", "sklearn"]),
        ("timm_loop", ["sklearn"]),
    ],
)
def test_two_processes_give_the_losses_of_one(name, packages, tmp_path):
    for package in packages:
        pytest.importorskip(package)
    (whole,) = losses(name, tmp_path, [])
    variables = {"STRATEGY": "ddp", "DEVICES": "2"} if name == "lightning_module" else {}
    ways = [losses(name, tmp_path, TORCHRUN, **variables)]
    if variables:  # Lightning starts processes itself, too
        ways.append(losses(name, tmp_path, [], **variables))
    for ranks in ways:
        assert len(ranks) == 2
        for rank in ranks:
            assert rank == pytest.approx(whole, rel=TOLERANCE) and len(rank) >= 2
