"""The classifier of the demo, for `mts-fast train --model tree_model:mlp`."""

from torch import nn


def mlp(num_classes: int) -> nn.Module:
    """On pictures of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, num_classes)
    )
