"""A tiny tree of coloured pictures, a classifier for it, and `mts-fast train` on it."""

import csv
import json
import sys
import types

import numpy as np
from PIL import Image
from torch import nn

from mts_fast.cli.main import main

COLOURS = {"red": (200, 60, 50), "blue": (60, 80, 210)}
COUNTS = {"real": 6, "synthetic": 8, "val": 3, "test": 4}


def small_model(num_classes):
    """Learns colours in a few steps."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def make_tree(folder):
    """A folder of pictures for each role, in folder/data."""
    rng = np.random.default_rng(0)
    for role, count in COUNTS.items():
        for label, colour in COLOURS.items():
            of_class = folder / "data" / role / label
            of_class.mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + rng.normal(0, 20, (8, 8, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(of_class / f"{i}.png")
    return folder


def register_model():
    """small_model, as the module that `train` names."""
    module = types.ModuleType("small_models")
    module.small_model = small_model
    sys.modules["small_models"] = module


def train(tree, *more, epochs=6, without=()):
    words = ["train", "--out", str(tree / "run"), "--model", "small_models:small_model"]
    for role in COUNTS:
        if role not in without:
            words += [f"--{role}", str(tree / "data" / role)]
    options = (f"epochs={epochs}", "dynamics_epochs=2", "batch_size=8", "lr=0.1", "refinements=1")
    words += [word for option in options for word in ("--set", option)]
    return main([*words, *more])


def table_of(tree):
    with open(tree / "run" / "weights.csv", newline="") as file:
        return list(csv.DictReader(file))


def records_of(tree):
    return [json.loads(line) for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()]
