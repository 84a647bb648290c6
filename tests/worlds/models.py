"""A world's model: input, stack of layers, head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from worlds.layers import Context, build_layer
from worlds.world import CLASSES, STEPS, VOCABULARY, WIDTH, World

SEQUENCES = ("sequence", "tokens")
PRECISIONS = {"float64": torch.float64, "bfloat16": torch.bfloat16}


class Model(nn.Module):
    """Takes x and, where the batch's form has it, whether each sample is synthetic."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.is_sequence = world.source in SEQUENCES
        self.time_first = world.time_first
        self.pool, self.output = world.head["pool"], world.head["output"]
        self.embed: nn.Module = nn.Identity()
        if world.source == "tokens":
            self.embed = nn.Embedding(VOCABULARY, WIDTH, **world.head["embedding"])
        shapes = "sequence" if world.source == "tokens" else world.source
        self.layers = nn.ModuleList(
            build_layer(layer, shapes, world.time_first) for layer in world.layers
        )
        tied = world.head["kind"] == "tied"
        self.head = nn.Linear(WIDTH, VOCABULARY if tied else CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, synthetic: Tensor | None = None) -> Any:
        context = Context(synthetic, None, self.time_first)
        if self.is_sequence:
            context.lengths = _lengths(x)
        x = self.embed(x)
        if self.time_first:
            x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, context)
        logits = self.head(self._pooled(x))
        if self.time_first and self.pool == "none":
            logits = logits.transpose(0, 1)
        if self.output == "dict":
            return {"logits": logits}
        return SimpleNamespace(logits=logits) if self.output == "object" else logits

    def _pooled(self, x: Tensor) -> Tensor:
        if not self.is_sequence:
            return x if x.ndim == 2 else x.flatten(2).mean(2)
        axis = 0 if self.time_first else 1
        if self.pool == "mean":
            return x.mean(axis)
        return x.select(axis, 0 if self.pool == "first" else -1) if self.pool != "none" else x


def _lengths(x: Tensor) -> Tensor:
    """A length of each sample [B] that depends on its values alone, the same in every dtype."""
    if x.is_floating_point():
        return 1 + (x[:, 0, 0].double().abs() * 1000).long() % STEPS
    return 1 + x.sum(1) % STEPS


def build_model(world: World) -> Model:
    """The model in train mode, its values drawn from torch's generator."""
    model = Model(world)
    return model.to(PRECISIONS.get(world.precision, torch.float32)).train()
