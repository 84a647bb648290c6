"""Layers whose parameters reach the activations through functions of parameters, and experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worlds.layer import Context, Layer
from worlds.world import WIDTH


class Decay(Layer):
    """A state that decays by -exp(A), position after position (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a, self.skip = (
            nn.Parameter(torch.randn(WIDTH) / 2),
            nn.Parameter(torch.ones(WIDTH)),
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        steps = x if context.time_first else x.transpose(0, 1)
        decay, state, states = torch.exp(-torch.exp(self.log_a)), torch.zeros_like(steps[0]), []
        for step in steps:
            state = decay * state + step
            states.append(state)
        y = torch.stack(states)
        return (y if context.time_first else y.transpose(0, 1)) + self.skip * x


class RelativeBias(Layer):
    """One head whose scores get a bias by the distance of two positions (T5)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = x.transpose(0, 1) if context.time_first else x
        steps = torch.arange(y.shape[1], device=x.device)
        distance = (steps[:, None] - steps[None]).clamp(-2, 2) + 2
        scores = y @ y.transpose(1, 2) + self.table(distance)[..., 0]
        mixed = scores.softmax(-1) @ y
        return x + (mixed.transpose(0, 1) if context.time_first else mixed)


class Routed(Layer):
    """Each row goes to the expert with the largest gate, in a loop over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / 3)

    def run(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        share, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for k in range(2):
            index = (chosen == k).nonzero()[:, 0]
            y = F.linear(rows[index], self.experts[k]) * share[index, None]
            out.index_add_(0, index, y.to(out.dtype))
        return x + out.view(x.shape)


class Merged(Layer):
    """A weight with a low-rank change merged into it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Parameter(torch.randn(2, WIDTH) / 2)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) / 2)

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)


DERIVED_LAYERS: dict[str, type[Layer]] = {
    "decay": Decay,
    "relative_bias": RelativeBias,
    "routed": Routed,
    "merged": Merged,
}
