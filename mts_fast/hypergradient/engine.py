"""The interface of engines: per-sample losses at fixed parameters, and their J^T p and J v."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import (
    Restoring,
    RngState,
    SavedBuffers,
    preserved_buffers,
    preserved_rng,
)
from mts_fast.hypergradient.objective import LabelledBatch, Objective


def dense(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Strided gradients: an Embedding(sparse=True) gives sparse ones, which update rules and dots
    do not take. The optimizer's step on the dense gradient is the same."""
    return [g if g is None or g.layout == torch.strided else g.to_dense() for g in gradients]


class Linearization(ABC):
    """One train-mode forward of a batch; J [B, P] is the Jacobian of its losses.

    `gradient(p)` is J^T p and `dots(v)` is J v, each with the dropout masks of this forward. Row 3
    is one `gradient`, row 9 another one: the parameters do not move in between.
    """

    def __init__(self, engine: Engine, batch: LabelledBatch, gradients: int) -> None:
        self.engine = engine
        self.batch = batch
        self._gradients_left = gradients

    def run(self) -> None:
        """The forward, where it has not been run yet."""
        _ = self.losses

    def begin(self) -> None:  # noqa: B027, most have run by then
        """Fix the random state in which a forward that has not been run yet will begin."""

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """[B], detached."""

    @abstractmethod
    def gradient(self, p: Tensor) -> list[Tensor | None]:
        """sum_i p_i grad l_i per parameter, None where a loss does not depend on it."""

    @abstractmethod
    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        """d_i = <direction, grad l_i> [B]."""

    def _count_gradient(self) -> None:
        if self._gradients_left == 0:
            hint = "announce it in linearize(gradients=)"
            expected = "among those announced"
            fail(RuntimeError, "Linearization", "gradient", expected, "one more", hint)
        self._gradients_left -= 1


class RetainedGraph(Linearization):
    """Keeps the graph of the forward until the last gradient; without dots of its own."""

    def __init__(self, engine: Engine, batch: LabelledBatch, gradients: int) -> None:
        super().__init__(engine, batch, gradients)
        self._rng = RngState.capture(engine.objective.world)
        self._buffers = SavedBuffers(engine.objective.world)
        self._graph: Tensor | None = None
        self._losses: Tensor | None = None
        if gradients:
            self._graph = self._forward()
            self._losses = self._graph.detach()

    def _forward(self) -> Tensor:
        """The losses [B] with their graph."""
        return self.engine.objective.losses(self.batch)

    @property
    def losses(self) -> Tensor:
        if self._losses is None:
            with torch.no_grad():
                self._losses = self.engine.objective.losses(self.batch)
        return self._losses

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        assert self._graph is not None
        with self.batch.around_forward():  # parts that are checkpointed run again
            gradient = self.engine.objective.gradients(
                self._graph,
                self.engine.parameters,
                p.to(self._graph.dtype),
                retain_graph=self._gradients_left > 0,
            )
        if not self._gradients_left:
            self._graph = None
        return dense(gradient)

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        raise AssertionError("dots have to be announced in linearize(dots=True)")

    def _rewound_buffers(self) -> Restoring:
        """Buffers as they were before this forward: a model may read buffers that it writes."""
        now = SavedBuffers(self.engine.objective.world)
        return Restoring(now.restore, self._buffers.restore)


class Engine(ABC):
    """Computes row 6. `parameters` is the list that gradients and directions are aligned with."""

    name: str

    def __init__(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        self.objective = objective
        self.parameters = list(parameters)

    @abstractmethod
    def reasons(self) -> list[str]:
        """Why this engine cannot serve the model in its present modes; empty where it can.

        Reasons that only a forward shows are raised by `linearize`.
        """

    def tangents(self, direction: Sequence[Tensor]) -> Mapping[int, Tensor]:
        """Those of the tensors that layers get, by id, for a direction along the parameters."""
        return {id(p): v for p, v in zip(self.parameters, direction, strict=True)}

    @abstractmethod
    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        """Run the batch forward once; moves buffers and generators as any forward does.

        `gradients` and `dots` announce what will be asked for, so that nothing else is kept. With
        0 gradients the forward may be left out until the losses are read.
        """

    def dots(self, batch: LabelledBatch, direction: Sequence[Tensor]) -> Tensor:
        """d_i = <direction, grad l_i> [B]; buffers and generators are left as they are."""
        world = self.objective.world
        with preserved_rng(world), preserved_buffers(world):
            return self.linearize(batch, gradients=0).dots(direction)
