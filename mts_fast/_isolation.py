"""Context managers that let a model be run without a trace: modes, buffers, parameters, RNG.

All copies go through `.data`: the bytes come back exactly as they were and autograd's version
counters do not move, so a graph recorded before stays valid afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RngState:
    """The generators that a forward pass may draw from: the CPU's and those of the CUDA devices."""

    cpu: Tensor
    cuda: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> RngState:
        """Read the default generators of the CPU and of every CUDA device among `tensors`."""
        devices = {t.device for t in tensors if t.is_cuda}
        return cls(torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices})

    def equals(self, other: RngState) -> bool:
        """Whether no generator moved in between."""
        return torch.equal(self.cpu, other.cpu) and all(
            torch.equal(state, other.cuda[device]) for device, state in self.cuda.items()
        )

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def preserved_rng(model: nn.Module, start: RngState | None = None) -> Iterator[None]:
    """Leave the generators as they were; inside, begin from `start` where given."""
    before = RngState.capture(model.parameters())
    if start is not None:
        start.restore()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Leave every buffer (BatchNorm statistics, counters) bitwise as it was."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, before in saved:
            buffer.data.copy_(before)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Put buffers and generators back when something raises inside."""
    rng = RngState.capture(model.parameters())
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        for buffer, before in saved:
            buffer.data.copy_(before)
        rng.restore()
        raise


@contextmanager
def replaced_parameters(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Run with other parameter values, then put the old ones back by copy, bitwise."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        _overwrite(parameters, values)
        yield
    finally:
        _overwrite(parameters, saved)


def _overwrite(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    # autocast keeps low-precision copies of the weights, which are now of other values.
    torch.clear_autocast_cache()


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Put the whole model in train or eval mode, then give each module its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
