"""`mts-fast train` killed at random moments: the resumed run ends where the whole one does."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rank_pool import SLOW
from small_runs import COUNTS, make_tree, records_of, table_of

KILLS = 10
TIMES = ("seconds", "samples_per_second")


@pytest.fixture
def command(tmp_path):
    """Words that run it in a process of its own, in tmp_path."""
    (tmp_path / "small_net.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(),\n"
        "        nn.Linear(16, num_classes))\n"
    )
    make_tree(tmp_path)
    words = [sys.executable, "-m", "mts_fast.cli.main", "train", "--model", "small_net:net"]
    words += [word for role in COUNTS for word in (f"--{role}", f"data/{role}")]
    options = ("epochs=60", "dynamics_epochs=5", "batch_size=8", "refinements=1", "flip=true")
    return [*words, *(word for option in options for word in ("--set", option))]


def start(command, folder, out):
    folders = [os.environ.get("PYTHONPATH", ""), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    quiet = subprocess.DEVNULL
    words = [*command, "--out", out]
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=quiet, stderr=quiet)


def outcome(folder):
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in records_of(folder)]
    return table_of(folder), records


@SLOW
def test_killed_and_resumed(command, tmp_path):
    began = time.perf_counter()
    assert start(command, tmp_path, "run").wait() == 0
    duration = time.perf_counter() - began
    whole = outcome(tmp_path)
    (tmp_path / "run").rename(tmp_path / "whole")
    draws = random.Random(0)
    killed = 0
    while killed < KILLS:
        process = start(command, tmp_path, "run")
        try:
            process.wait(draws.uniform(0.2, 0.95) * duration)
            # it ended before the draw, as what was killed late does: the next one begins anew
            shutil.rmtree(tmp_path / "run")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert start(command, tmp_path, "run").wait() == 0
    assert outcome(tmp_path) == whole
