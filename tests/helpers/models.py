"""Small models of every kind that the library must serve, each with a batch to run it on.

Activations are smooth, so that finite differences have no kinks to step over.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CLASSES = 3
BATCH = 6


@dataclass
class Case:
    """A model in train mode, its inputs and labels [B] or [B, T]."""

    model: nn.Module
    inputs: Any
    labels: torch.Tensor

    def named(self):
        """The trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


class TiedTagger(nn.Module):
    """Tokens [B, T] to logits [B, T, vocabulary]; the embedding is the output matrix too."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 5)
        self.mix = nn.Linear(5, 5)
        self.out = nn.Linear(5, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.mix(self.embed(tokens)).tanh())


class TransformerTagger(nn.Module):
    """Vectors [B, T, 8] to logits [B, T, C]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, nn.functional.gelu, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x))


class TwoTower(nn.Module):
    """Takes two named inputs and returns its logits in a mapping."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(3, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, left, right):
        return {"logits": self.head(self.left(left).tanh() * self.right(right).sigmoid())}


class LSTMClassifier(nn.Module):
    """Sequences [B, T, 4] to logits [B, C]."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def mlp(inputs=4, classes=CLASSES, width=8):
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, classes))


def batchnorm_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        # a bias before BatchNorm has a gradient of rounding noise, which Adam divides by itself
        nn.Conv2d(4, 5, 3, stride=2, bias=False),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


def dropout_mlp():
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, CLASSES), nn.Dropout(0.2)
    )


def norm_and_dropout(inputs=4):
    """Every train-mode forward changes its buffers and the random generators."""
    return nn.Sequential(
        nn.Linear(inputs, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


def partly_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def make_case(name, device, dtype=torch.float64):
    """The model `name` and a batch, seeded, on the device."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator).to(device)

    model = _MODELS[name]().to(device, dtype).train()
    labels = integers(CLASSES, BATCH)
    if name == "batchnorm_cnn":
        return Case(model, normal(BATCH, 2, 6, 6), labels)
    if name == "transformer":
        return Case(model, normal(BATCH, 5, 8), integers(CLASSES, BATCH, 5))
    if name == "tied":
        return Case(model, integers(7, BATCH, 5), integers(7, BATCH, 5))
    if name == "lstm":
        return Case(model, normal(BATCH, 5, 4), labels)
    if name == "dict_inputs":
        return Case(model, {"right": normal(BATCH, 3), "left": normal(BATCH, 4)}, labels)
    if name == "tuple_inputs":
        return Case(model, (normal(BATCH, 4), normal(BATCH, 3)), labels)
    return Case(model, normal(BATCH, 4), labels)


_MODELS = {
    "mlp": mlp,
    "batchnorm_cnn": batchnorm_cnn,
    "dropout_mlp": dropout_mlp,
    "norm_and_dropout": norm_and_dropout,
    "transformer": TransformerTagger,
    "tied": lambda: TiedTagger(7),
    "dict_inputs": TwoTower,
    "tuple_inputs": TwoTower,
    "partly_frozen": partly_frozen,
    "lstm": LSTMClassifier,
}
