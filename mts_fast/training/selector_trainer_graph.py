"""The selector's part of a step as CUDA graphs: many tiny launches become one replay each.

A selector has some twenty small tensors: scoring a batch and learning from it take dozens of
launches of microseconds each. The launches depend on the batch's shape alone, so they are recorded
once per shape and then replayed on the same memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mts_fast._check import describe, fail
from mts_fast.training.batch import CheckedBatch
from mts_fast.training.selector_trainer import EagerSelectorTrainer, Scorer, SelectorUpdate

OP = "MTSStep"
# eager calls before a recording: they allocate optimizer state and library workspaces, which must
# exist then
EAGER_CALLS = 3
# device types whose autocast settings a recording holds
DEVICE_TYPES = ("cpu", "cuda")

Function = Callable[..., tuple[Tensor, ...]]


class Recorder(Protocol):
    """Runs a function of tensors before it is recorded, and records it."""

    def check(self, scorer: Scorer, optimizer: torch.optim.Optimizer) -> None:
        """Raise where a selector and its optimizer cannot be recorded."""

    def run(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it once."""

    def record(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A function that replays it on the memory of these inputs; it is not run here."""


class CudaRecorder:
    """torch.cuda.graph, after runs on a side stream, as torch requires."""

    def check(self, scorer: Scorer, optimizer: torch.optim.Optimizer) -> None:
        elsewhere = sorted({p.device.type for p in scorer.selector.parameters()} - {"cuda"})
        if elsewhere:
            hint = "leave it out, or move the selector to the GPU before its optimizer is made"
            got = f"a selector on {', '.join(elsewhere)}"
            fail(RuntimeError, OP, "cuda_graph", "given with the selector on a GPU", got, hint)
        _check_capturable(optimizer)

    def run(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.cuda.device(inputs[0].device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                outputs = function(*inputs)
            current.wait_stream(side)
            for tensor in outputs:
                tensor.record_stream(current)
        return outputs

    def record(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> Callable[[], tuple[Tensor, ...]]:
        device = inputs[0].device
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            # a stream of this device; thread_local leaves other threads alone (a pinning loader)
            stream = torch.cuda.Stream()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                outputs = function(*inputs)

        def replay() -> tuple[Tensor, ...]:
            with torch.cuda.device(device):
                graph.replay()
            return outputs

        return replay


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
        recorder.check(scorer, optimizer)
        _check(scorer, optimizer, scheduled=scheduled)
        self._scorer = scorer
        self._optimizer = optimizer
        self._eager = EagerSelectorTrainer(scorer, optimizer)
        self._forward = Replayed(self._forward_tensors, self._state, recorder)
        self._step = Replayed(self._step_tensors, self._state, recorder)

    def forward(self, batch: CheckedBatch, h: Tensor, *, updates: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B]); `step` computes z again, with its graph."""
        z, p = self._forward(*self._scorer.arguments(batch, h))
        return z, p

    def step(self, update: SelectorUpdate) -> None:
        """One step of the selector's optimizer."""
        self._step(*self._scorer.arguments(update.batch, update.features), update.dots)

    def _forward_tensors(self, h: Tensor, classes: Tensor, flags: Tensor) -> tuple[Tensor, ...]:
        with _autocast_without_cache(h.device.type):
            return self._eager.forward(_batch(classes, flags), h, updates=False)

    def _step_tensors(
        self, h: Tensor, classes: Tensor, flags: Tensor, dots: Tensor
    ) -> tuple[Tensor, ...]:
        batch = _batch(classes, flags)
        with _autocast_without_cache(h.device.type):
            z, p = self._eager.forward(batch, h, updates=True)
            self._eager.step(SelectorUpdate(batch, h, z, p, dots))
        return ()

    def _state(self) -> object:
        """Pointers and scalars that a recording holds, autocast settings, the selector's mode."""
        pointers = [p.data_ptr() for p in self._scorer.selector.parameters()]
        for state in self._optimizer.state.values():
            pointers += [v.data_ptr() for v in state.values() if isinstance(v, Tensor)]
        scalars = [
            (name, value.data_ptr() if isinstance(value, Tensor) else value)
            for group in self._optimizer.param_groups
            for name, value in group.items()
            if name != "params"
        ]
        weight = self._scorer.class_weight
        pointers.append(0 if weight is None else weight.data_ptr())
        casts = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in DEVICE_TYPES]
        return pointers, scalars, casts, self._scorer.selector.training


def _autocast_without_cache(kind: str) -> torch.autocast:
    """The current autocast settings without the weight cache. A cached low-precision copy is stale
    after the selector's update, and a captured graph would keep reading its freed memory."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def _check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that count steps or read values on the host: a recording freezes both."""
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    if all(group.get("capturable") is True for group in groups):
        return
    argument, expected = "selector_optimizer", "capturable with cuda_graph"
    if any("capturable" in group for group in groups):
        hint = f"make it with {name}(..., capturable=True)"
        fail(ValueError, OP, argument, expected, f"{name}(capturable=False)", hint)
    if not isinstance(optimizer, torch.optim.SGD):
        hint = "take SGD, or one of torch's with capturable=True"
        fail(ValueError, OP, argument, expected, name, hint)
    if any(isinstance(g["lr"], Tensor) and not g["fused"] for g in groups):
        hint = "make it with SGD(..., fused=True): other implementations read lr on the host"
        fail(ValueError, OP, argument, expected, "SGD with lr as a tensor", hint)


def _batch(classes: Tensor, flags: Tensor) -> CheckedBatch:
    """The part of a batch that the selector reads."""
    return CheckedBatch(None, classes, None, flags, classes)


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
