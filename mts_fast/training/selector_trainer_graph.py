"""The selector's part of a step as CUDA graphs: many tiny launches become one replay each.

A selector has some twenty small tensors: scoring a batch and learning from it take dozens of
launches of microseconds each. The launches depend on the batch's shape alone, so they are recorded
once per shape and then replayed on the same memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import describe, fail
from mts_fast.training.batch import SelectorRows
from mts_fast.training.capturing import (
    DEVICE_TYPES,
    EAGER_CALLS,
    CudaRecorder,
    Function,
    Recorder,
    autocast_without_cache,
    memory_of,
)
from mts_fast.training.selector_trainer import EagerSelectorTrainer, Scorer, SelectorUpdate

OP = "MTSStep"


class Replayed:
    """A function that is recorded after EAGER_CALLS calls of one shape, and replayed from then on.

    `state()` returns all that a recording depends on beside its inputs: when it changes, the
    function is recorded again.
    """

    def __init__(self, function: Function, state: Callable[[], object], recorder: Recorder) -> None:
        self._function = function
        self._state = state
        self._recorder = recorder
        self._calls: dict[object, int] = defaultdict(int)
        # shape -> state, static inputs, replay
        self._recorded: dict[object, tuple[object, list[Tensor], Callable[..., Any]]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results, in memory of their own."""
        shape = tuple((t.shape, t.dtype, t.device) for t in inputs)
        if self._calls[shape] < EAGER_CALLS:
            self._calls[shape] += 1
            return self._recorder.run(self._function, inputs)
        state = self._state()
        if shape not in self._recorded or self._recorded[shape][0] != state:
            static = [t.clone() for t in inputs]
            replay = self._recorder.record(self._function, static)
            self._recorded[shape] = state, static, replay
        _, static, replay = self._recorded[shape]
        for buffer, value in zip(static, inputs, strict=True):
            buffer.copy_(value)
        return tuple(t.clone() for t in replay())


class GraphedSelectorTrainer:
    """Rows 1 and 2 (`forward`) and rows 7 and 8 (`step`) by replay.

    Raises:
        RuntimeError, ValueError: a selector that is not on a GPU, or has dropout or BatchNorm; an
            optimizer that cannot be captured; a learning rate that a scheduler would change in
            vain.
    """

    def __init__(
        self,
        scorer: Scorer,
        optimizer: torch.optim.Optimizer,
        *,
        scheduled: bool,
    ) -> None:
        recorder = CudaRecorder()
        recorder.check("selector_optimizer", optimizer)
        _check(scorer, optimizer, scheduled=scheduled)
        self._scorer = scorer
        self._optimizer = optimizer
        self._eager = EagerSelectorTrainer(scorer, optimizer)
        self._forward = Replayed(self._forward_tensors, self._state, recorder)
        self._step = Replayed(self._step_tensors, self._state, recorder)

    def forward(self, rows: SelectorRows, h: Tensor, *, updates: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B]); `step` computes z again, with its graph."""
        z, p = self._forward(*self._scorer.arguments(rows, h))
        return z, p

    def step(self, update: SelectorUpdate) -> None:
        """One step of the selector's optimizer."""
        self._step(*self._scorer.arguments(update.rows, update.features), update.dots)

    def _forward_tensors(self, h: Tensor, classes: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
        with autocast_without_cache(h.device.type):
            return self._eager.forward(SelectorRows(classes, flags), h, updates=False)

    def _step_tensors(
        self, h: Tensor, classes: Tensor, flags: Tensor, dots: Tensor
    ) -> tuple[Tensor, ...]:
        rows = SelectorRows(classes, flags)
        with autocast_without_cache(h.device.type):
            z, p = self._eager.forward(rows, h, updates=True)
            self._eager.step(SelectorUpdate(rows, h, z, p, dots))
        return ()

    def _state(self) -> object:
        """Pointers and scalars that a recording holds, autocast settings, the selector's mode."""
        tensors, scalars = memory_of(self._optimizer)
        pointers = [t.data_ptr() for t in (*self._scorer.selector.parameters(), *tensors)]
        weight = self._scorer.class_weight
        pointers.append(0 if weight is None else weight.data_ptr())
        casts = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in DEVICE_TYPES]
        return pointers, scalars, casts, self._scorer.selector.training


def _check(scorer: Scorer, optimizer: torch.optim.Optimizer, *, scheduled: bool) -> None:
    names = [name for name, m in scorer.selector.named_modules() if _differs_when_run_again(m)]
    if names:
        hint = "the recorded step runs the selector once more"
        expected = "free of dropout and BatchNorm with cuda_graph"
        fail(ValueError, OP, "selector", expected, names, hint)
    rates = [group["lr"] for group in optimizer.param_groups]
    wanted = next(scorer.selector.parameters()).device
    if scheduled and not all(isinstance(lr, Tensor) and lr.device == wanted for lr in rates):
        name = type(optimizer).__name__
        hint = f"make it with {name}(..., lr=torch.tensor(1e-3, device={str(wanted)!r}))"
        expected = f"given lr as a tensor on {wanted} where cuda_graph meets selector_scheduler"
        fail(ValueError, OP, "selector_optimizer", expected, describe(rates[0]), hint)


def _differs_when_run_again(module: nn.Module) -> bool:
    """Whether a module draws random numbers or updates statistics; plain functions that its
    forward calls are not seen."""
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    share = getattr(module, "dropout", 0)  # of recurrent layers and attention
    return isinstance(module, kinds) or (isinstance(share, int | float) and share > 0)
