"""What a layer of a random world is, and the simplest ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Context:
    """What layers may read beside their input."""

    synthetic: Tensor | None  # [B]
    lengths: Tensor | None  # [B], of sequences
    time_first: bool

    @property
    def batch_axis(self) -> int:
        """Where the samples of a sequence lie."""
        return 1 if self.time_first else 0


class Layer(nn.Module):
    """A layer without use for the context."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def _trained(norm: nn.Module) -> nn.Module:
    """A norm that is not as it was made: one that begins with a bias of 0 and is averaged over all
    positions gives rounding noise alone."""
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


class Wrapped(Layer):
    """Any module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        return self.module(x)


class Function(Layer):
    """Any function of (self, x), with parameters of given shapes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def run(self, x: Tensor) -> Tensor:
        return self.function(self, x)
