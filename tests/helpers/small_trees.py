"""Class folders of small images, and a classifier of them that a command line can name."""

import sys
import types

import numpy as np
from PIL import Image
from torch import nn

COLOURS = {"red": (200, 60, 50), "blue": (60, 80, 210)}


def small_model(num_classes):
    """Learns colours in a few steps."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def install_small_model(monkeypatch):
    """Make it `--model small_models:small_model`."""
    module = types.ModuleType("small_models")
    module.small_model = small_model
    monkeypatch.setitem(sys.modules, "small_models", module)


def colours_of(classes):
    """A colour for each class, of one seed."""
    rng = np.random.default_rng(0)
    return {label: tuple(rng.integers(40, 216, 3)) for label in classes}


def write_images(folder, colours, count, *, seed, size=8):
    """`count` noisy images of each class below `folder`; returns their paths."""
    rng = np.random.default_rng(seed)
    paths = []
    for label, colour in colours.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.array(colour) + rng.normal(0, 20, (size, size, 3))
            paths.append(folder / label / f"{i}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths
