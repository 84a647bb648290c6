"""Row 6 by forward-mode automatic differentiation: exact to rounding, where every op has it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mts_fast._isolation import RngState, preserved_rng
from mts_fast._multi_tensor import copies
from mts_fast.hypergradient.engine import Engine, Linearization, RetainedGraph
from mts_fast.hypergradient.frequency import FrequencyTables, frequency_reasons
from mts_fast.hypergradient.fused_tangents import FusedTangents, GraphWritten
from mts_fast.hypergradient.objective import LabelledBatch
from mts_fast.hypergradient.serving import eager, serving, sharded_reasons
from mts_fast.hypergradient.synced import synced_reasons
from mts_fast.hypergradient.training_forward import ForwardCall, RecordedForward


class ForwardMode(Engine):
    """d = tangent of the losses when theta has the tangent v; one forward with tangents."""

    name = "forward_mode"

    def reasons(self) -> list[str]:
        # an RNN keeps a flat list of its weights, which parameters swapped in do not reach
        reasons = [
            f"{path or 'the model'} is a {type(module).__name__}, whose weights cannot be swapped"
            for path, module in self.objective.modules_that(lambda m: isinstance(m, nn.RNNBase))
        ]
        reasons += frequency_reasons(self.objective) + sharded_reasons(self.objective)
        reasons += synced_reasons(self.objective.model, "forward-mode derivative")
        known = {id(p) for p in self.objective.model.parameters()}
        if any(id(p) not in known for p in self.parameters):
            reasons.append("the optimizer holds parameters that are not the model's")
        return reasons

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        return ForwardLinearization(self, batch, gradients, dots)

    def tangent(
        self,
        batch: LabelledBatch,
        direction: Sequence[Tensor],
        rng: RngState,
        calls: deque[ForwardCall],
    ) -> Tensor:
        """d [B], with the calls of the training forward where it has run; the caller puts buffers
        back."""
        model = self.objective.model
        # copies, since duals need tangents with memory of their own
        tangent = {id(p): v for p, v in zip(self.parameters, copies(direction), strict=True)}
        named = dict(model.named_buffers())
        buffers = dict(zip(named, copies(list(named.values())), strict=True))
        counters = [id(b) for name, b in buffers.items() if name.endswith("num_batches_tracked")]
        at = {p.data_ptr(): tangent[id(p)] for p in self.parameters}
        world = self.objective.world
        # fused attention and fused encoder layers have no forward mode; the plain ones compute the
        # same values
        with (
            serving(self.name),
            torch.no_grad(),
            preserved_rng(world, rng),
            eager(self.objective),
            sdpa_kernel(SDPBackend.MATH),
            _plain_encoder_layers(),
            FrequencyTables(self.objective).differentiable(),
            forward_ad.dual_level(),
        ):
            duals = {
                name: forward_ad.make_dual(p.detach(), tangent[id(p)])
                for name, p in model.named_parameters()
                if id(p) in tangent
            }
            swapped = _Functional(model, {**duals, **buffers})
            with FusedTangents(calls, at, counters):
                losses = self.objective.with_model(swapped).losses(batch)
            dots = forward_ad.unpack_dual(losses).tangent
        return torch.zeros_like(losses) if dots is None else dots


class ForwardLinearization(RetainedGraph):
    """The kept graph of the forward, and outputs of its linear maps."""

    engine: ForwardMode

    def __init__(
        self, engine: ForwardMode, batch: LabelledBatch, gradients: int, dots: bool
    ) -> None:
        self._calls: deque[ForwardCall] = deque()
        # a mode would keep torch.compile from its graphs
        self._records = dots and not engine.objective.is_compiled
        super().__init__(engine, batch, gradients)

    def _forward(self) -> Tensor:
        if not self._records:
            return super()._forward()
        with RecordedForward() as recorded:
            graph = super()._forward()
        self._calls = recorded.calls
        return graph

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        calls, self._calls = self._calls, deque()
        try:
            return self._tangent(direction, calls)
        except GraphWritten:
            return self._tangent(direction, deque())

    def _tangent(self, direction: Sequence[Tensor], calls: deque[ForwardCall]) -> Tensor:
        with self._rewound_buffers():
            return self.engine.tangent(self.batch, direction, self._rng, calls)


@contextmanager
def _plain_encoder_layers() -> Iterator[None]:
    """Keep nn.TransformerEncoderLayer and MultiheadAttention off their inference path."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Functional(nn.Module):
    """The model with other tensors in place of its own; holds no parameters of its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda args, kwargs: functional_call(model, tensors, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)
