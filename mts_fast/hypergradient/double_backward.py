"""Row 6 by differentiating the gradient: exact wherever ops have a second derivative.

The graph is that of the training forward itself, so no masks, generators, buffers or inputs have to
be replayed, and d_i is autograd's gradient also where that is not the derivative of the forward
(straight-through estimators, gradient reversal, detached targets).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mts_fast import reference
from mts_fast.hypergradient.engine import Engine, Linearization, dense
from mts_fast.hypergradient.frequency import FrequencyTables, frequency_reasons
from mts_fast.hypergradient.objective import LabelledBatch, Objective
from mts_fast.hypergradient.precision import is_low_precision
from mts_fast.hypergradient.serving import eager, serving, sharded_reasons
from mts_fast.hypergradient.synced import synced_reasons


@contextmanager
def twice_differentiable(objective: Objective) -> Iterator[None]:
    """Forwards inside take no kernel without a second derivative: no fused attention, no recurrent
    layer of cuDNN."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in objective.world.modules)
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent),
        FrequencyTables(objective).differentiable(),
    ):
        yield


class DoubleBackward(Engine):
    """g = J^T p with its own graph; d = J v is the gradient of <g, v> by p."""

    name = "double_backward"

    def reasons(self) -> list[str]:
        reasons = frequency_reasons(self.objective) + sharded_reasons(self.objective)
        return reasons + synced_reasons(self.objective.model, "second derivative")

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        return DoubleBackwardLinearization(self, batch, gradients, dots)


class DoubleBackwardLinearization(Linearization):
    """Keeps the graph of the forward, and of the first gradient until the dots are known."""

    def __init__(self, engine: Engine, batch: LabelledBatch, gradients: int, dots: bool) -> None:
        super().__init__(engine, batch, gradients)
        self._dots_are_due = dots
        self._first: tuple[Tensor, list[Tensor | None]] | None = None  # p and its gradient
        # with create_graph torch takes the gradient of a norm in single 16-bit operations: errors
        # of 20 % were seen, so in 16 bits the gradient to train on is taken without it
        self._coarse = is_low_precision(engine.parameters)
        objective = engine.objective
        with twice_differentiable(objective), eager(objective):
            self._graph: Tensor | None = objective.losses(batch)
        self._losses = self._graph.detach()

    @property
    def losses(self) -> Tensor:
        return self._losses

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        with self.batch.around_forward():  # parts that are checkpointed run again
            return self._gradient(p)

    def _gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        graph, parameters = self._graph, self.engine.parameters
        assert graph is not None
        p = p.detach().to(graph.dtype)
        if self._dots_are_due and self._first is None and not self._coarse:
            p = p.clone().requires_grad_()
            with serving(self.engine.name):
                gradient = torch.autograd.grad(
                    graph, parameters, p, create_graph=True, allow_unused=True
                )
            self._first = p, dense(gradient)
            return [None if g is None else g.detach() for g in self._first[1]]
        keep = self._dots_are_due or self._gradients_left > 0
        gradient = torch.autograd.grad(graph, parameters, p, retain_graph=keep, allow_unused=True)
        if not keep:
            self._graph = None
        return dense(gradient)

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        graph = self._graph
        assert graph is not None
        with serving(self.engine.name), self.batch.around_forward():
            if self._first is None:
                dots = reference.hypergradient_dots(graph, self.engine.parameters, direction)
            else:
                p, gradient = self._first
                terms = [
                    (g * v.to(g.dtype)).sum()
                    for g, v in zip(gradient, direction, strict=True)
                    if g is not None
                ]
                dots = torch.autograd.grad(torch.stack(terms).sum(), p, retain_graph=True)[0]
        self._dots_are_due, self._first = False, None
        if not self._gradients_left:
            self._graph = None
        return dots
