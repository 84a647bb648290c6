"""State outside of parameters: the global generators that a model may draw from, and buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Generators:
    """Their states at one moment."""

    torch_state: Tensor
    numpy_state: Any
    python_state: Any

    @classmethod
    def now(cls) -> Generators:
        """As they are."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Set them back."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)

    def moved_since(self, other: Generators) -> list[str]:
        """Which ones are not where they were."""
        same = {
            "torch": torch.equal(self.torch_state, other.torch_state),
            "numpy": all(map(np.array_equal, self.numpy_state, other.numpy_state)),
            "python": self.python_state == other.python_state,
        }
        return [name for name, equal in same.items() if not equal]


@contextmanager
def drawing_from(start: Generators) -> Iterator[None]:
    """Begin from `start`; afterwards the generators are where they were before."""
    before = Generators.now()
    start.restore()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def preserved_buffers(*modules: Any) -> Iterator[None]:
    """Afterwards every buffer is as it was, also one that was replaced."""
    places = [
        (part, name, buffer, buffer.clone())
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in places:
            part._buffers[name] = buffer
            buffer.data.copy_(value)
