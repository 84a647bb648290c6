"""Small classifiers in float64, MTSSteps of them, batches by seed, and the generators' state."""

import random

import numpy as np
import torch
from torch import nn

import mts_fast

SIZE, CLASSES = 12, 3


def batch(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE + 7, 4, generator=g, dtype=dtype)
    y = torch.randint(CLASSES, (SIZE + 7,), generator=g)
    return {"inputs": x[:SIZE], "labels": y[:SIZE], "val_inputs": x[SIZE:], "val_labels": y[SIZE:]}


def step_of(model, *, selector=None, **options):
    torch.manual_seed(1)
    selector = selector or mts_fast.Selector(0, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        **{"online_features": False, **options},
    )


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, CLASSES)
        self.double()


def set_generators(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def generators():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
