"""`mts-fast train` on a tree of tiny pictures, and what it leaves."""

import csv
import json

from small_trees import COLOURS, write_images

from mts_fast.cli.main import main

COUNTS = {"real": 6, "synthetic": 8, "val": 3, "test": 4}


def make_tree(folder):
    """A folder of pictures for each role, in folder/data."""
    for seed, (role, count) in enumerate(COUNTS.items()):
        write_images(folder / "data" / role, COLOURS, count, seed=seed)
    return folder


def train(tree, *more, epochs=6, without=()):
    """Run it in tree/run; returns the exit status."""
    words = ["train", "--out", str(tree / "run"), "--model", "small_models:small_model"]
    for role in COUNTS:
        if role not in without:
            words += [f"--{role}", str(tree / "data" / role)]
    options = (f"epochs={epochs}", "dynamics_epochs=2", "batch_size=8", "lr=0.1", "refinements=1")
    words += [word for option in options for word in ("--set", option)]
    return main([*words, *more])


def table_of(tree):
    """Rows of the table of weights."""
    with open(tree / "run" / "weights.csv", newline="") as file:
        return list(csv.DictReader(file))


def records_of(tree):
    """Records of the log."""
    return [json.loads(line) for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()]
