"""Runs of the command that are to be equal, however many processes have made them."""

import csv
import json

import pytest
import torch
from small_runs import COUNTS

from mts_fast.pipeline.checkpoints import load_state

# observed: 4e-16 on four ranks in float64; a selector is in float32
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def words_of(data, out, *options, model="rank_tool:net"):
    words = ["train", "--model", model, "--out", str(data / out)]
    words += [word for role in COUNTS for word in (f"--{role}", str(data / "data" / role))]
    options = (*OPTIONS, *options)
    return words + [word for option in options for word in ("--set", option)]


# batches of 9 on 4 ranks have parts of 3 and 2 samples
OPTIONS = ("epochs=2", "dynamics_epochs=2", "batch_size=9", "lr=0.1", "refinements=1", "flip=true")


# of the stages that depend on data and options alone, not on the last bits of earlier ones
FIRST_STAGES = {
    *("dynamics", "embeddings", "everything-alike", "features", "mts", "real-+-validation")
}


def stages_of(folder):
    """(key, what it made) of each stage, by name."""
    stages = {}
    for path in folder.glob("stages/*/done.safetensors"):
        name, _, key = path.parent.name.rpartition("-")
        stages[name] = (key, load_state(path))
    return stages


def weights_of(folder):
    with (folder / "weights.csv").open(newline="") as file:
        return [float(row["weight"]) for row in csv.DictReader(file)]


def assert_same_run(folder, whole):
    """Stages of the same keys with the same tensors, and what a user reads."""
    ours, theirs = stages_of(folder), stages_of(whole)
    assert ours.keys() == theirs.keys() and ours.keys() > FIRST_STAGES
    for name, (key, made) in theirs.items():
        assert name not in FIRST_STAGES or ours[name][0] == key
        torch.testing.assert_close(ours[name][1], made, **EXACT)
    assert weights_of(folder) == pytest.approx(weights_of(whole), abs=1e-6)
    ours, theirs = (json.loads((f / "outcome.json").read_text()) for f in (folder, whole))
    for record in (ours, theirs):
        del record["weights_sha256"], record["environment"], record["stages"]
    assert ours == theirs
