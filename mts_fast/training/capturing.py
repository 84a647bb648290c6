"""What both kinds of CUDA graph share: the recorder, and what a recording must not freeze."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mts_fast._check import fail

OP = "MTSStep"
# eager calls before a recording: they allocate optimizer state and library workspaces, which must
# exist then
EAGER_CALLS = 3
# device types whose autocast settings a recording holds
DEVICE_TYPES = ("cpu", "cuda")

Function = Callable[..., tuple[Tensor, ...]]


class Recorder(Protocol):
    """Runs a function of tensors before it is recorded, and records it."""

    def check(self, arg: str, optimizer: torch.optim.Optimizer) -> None:
        """Raise where an optimizer's step, the optimizer being the argument `arg`, cannot be
        recorded."""

    def run(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run it once."""

    def record(
        self, function: Function, inputs: Sequence[Tensor]
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A function that replays it on the memory of these inputs; it is not run here."""


class CudaRecorder:
    """torch.cuda.graph, after runs on a side stream, as torch requires."""

    def check(self, arg: str, optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        elsewhere = sorted({p.device.type for p in parameters} - {"cuda"})
        if elsewhere:
            module = "selector" if arg == "selector_optimizer" else "model"
            hint = f"leave it out, or move the {module} to the GPU before its optimizer is made"
            got = f"a {module} on {', '.join(elsewhere)}"
            fail(RuntimeError, OP, "cuda_graph", f"given with the {module} on a GPU", got, hint)
        _check_capturable(arg, optimizer)

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


def memory_of(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[tuple[str, object]]]:
    """Tensors of an optimizer's state, and its options: tensors by address; those that are not with
    the parameters, and which the host reads, by value."""
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    options = [
        (name, _held(value, group["params"][0].device))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params" and group["params"]
    ]
    return tensors, options


def _held(value: object, device: torch.device) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.data_ptr() if value.device == device else value.tolist()


def autocast_without_cache(kind: str) -> torch.autocast:
    """The current autocast settings without the weight cache. A cached low-precision copy is stale
    after the selector's update, and a captured graph would keep reading its freed memory."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def _check_capturable(arg: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that count steps or read values on the host: a recording freezes both."""
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    if all(group.get("capturable") is True for group in groups):
        return
    expected = "capturable with cuda_graph"
    if any("capturable" in group for group in groups):
        hint = f"make it with {name}(..., capturable=True)"
        fail(ValueError, OP, arg, expected, f"{name}(capturable=False)", hint)
    if not isinstance(optimizer, torch.optim.SGD):
        hint = "take SGD, or one of torch's with capturable=True"
        fail(ValueError, OP, arg, expected, name, hint)
    if any(isinstance(g["lr"], Tensor) and not g["fused"] for g in groups):
        hint = "make it with SGD(..., fused=True): other implementations read lr on the host"
        fail(ValueError, OP, arg, expected, "SGD with lr as a tensor", hint)
