"""The example of one script for one process or many, as a user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rank_pool import SLOW

SCRIPT = Path(__file__).parents[2] / "examples" / "data_parallel.py"


def run(ranks, epochs=20, checkpoint=None):
    """(accuracy, norm of the parameters)."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    settings = {"STEPS": str(epochs), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    if checkpoint is not None:
        settings["CHECKPOINT"] = str(checkpoint)
    environment = os.environ | settings
    command = [*start, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(x) for x in re.findall(r"[\d.]+\d", done.stdout)]


@SLOW
def test_two_ranks_give_the_result_of_one_process(tmp_path):
    accuracy, norm = run(1)
    file = tmp_path / "state.pt"
    run(2, epochs=10, checkpoint=file)
    resumed = run(1, checkpoint=file)  # half on two ranks, half on one
    assert resumed[1] == pytest.approx(norm, rel=1e-4)
    assert resumed[0] == pytest.approx(accuracy, abs=0.01)
    assert accuracy > 0.5
