"""What an engine is: the per-sample losses at fixed parameters, with J^T p and J v at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import RngState
from mts_fast.hypergradient.objective import Objective


class Linearization:
    """One train-mode forward of a batch, kept with its graph.

    losses [B] (detached); `gradient(p)` is J^T p, as often as wanted; `dots(v)` is J v. J [B, P] is
    the Jacobian of the losses by the parameters. Row 3 is one `gradient`, row 9 another one on the
    same graph, since the parameters do not move in between.
    """

    def __init__(self, engine: Engine, inputs: Any, labels: Tensor) -> None:
        self._engine = engine
        self._inputs = inputs
        self._labels = labels
        self._rng = RngState.capture(engine.parameters)
        graph = engine.objective.losses(inputs, labels)  # [B]
        self.losses = graph.detach()
        self._graph: Tensor | None = graph

    def gradient(self, p: Tensor, *, last: bool = False) -> list[Tensor | None]:
        """sum_i p_i grad l_i per parameter, None where a loss does not depend on it.

        `last` releases the graph.
        """
        graph = self._graph
        if graph is None:
            fail(
                RuntimeError, "Linearization", "gradient", "asked for before the last one", "again"
            )
        if last:
            self._graph = None
        return list(
            torch.autograd.grad(
                graph,
                self._engine.parameters,
                p.to(graph.dtype),
                retain_graph=not last,
                allow_unused=True,
            )
        )

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        """d_i = <direction, grad l_i> [B], with the dropout masks of this forward."""
        return self._engine.dots(self._inputs, self._labels, direction, rng=self._rng)


class Engine(ABC):
    """Computes row 6. `parameters` is the list that gradients and directions are aligned with."""

    name: str

    def __init__(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        self.objective = objective
        self.parameters = list(parameters)

    @abstractmethod
    def reasons(self) -> list[str]:
        """Why this engine cannot serve the model; empty where it can."""

    @abstractmethod
    def dots(
        self,
        inputs: Any,
        labels: Tensor,
        direction: Sequence[Tensor],
        *,
        rng: RngState | None = None,
    ) -> Tensor:
        """d_i = <direction, grad l_i> [B] in the model's present mode.

        Buffers and generators are left as they are; masks are drawn from `rng`, or from the
        generators' present state.
        """

    def linearize(self, inputs: Any, labels: Tensor) -> Linearization:
        """Run the batch forward once; moves buffers and generators as any forward does."""
        return Linearization(self, inputs, labels)
