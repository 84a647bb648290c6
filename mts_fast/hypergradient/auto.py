"""The engine for those who do not want to choose one: ghost where it serves, differences else."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from mts_fast._isolation import RngState, restored_on_error
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.ghost import Ghost, Unsupported
from mts_fast.hypergradient.objective import LabelledBatch, Objective

logger = logging.getLogger("mts_fast")

# which modules are in train mode
Modes = tuple[bool, ...]


class Auto(Engine):
    """Decides at the first batch, and again when modules change their modes; says so at INFO."""

    name = "auto"

    def __init__(
        self, objective: Objective, parameters: Sequence[Tensor], *, memory: str = "fast"
    ) -> None:
        super().__init__(objective, parameters)
        self._ghost = Ghost(objective, parameters, memory=memory)
        self._fallback = FiniteDifference(objective, parameters)
        self._chosen: dict[Modes, Engine] = {}

    def reasons(self) -> list[str]:
        return []

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        modes = tuple(module.training for module in self.objective.model.modules())
        if self._chosen.get(modes) is not self._fallback:
            try:
                with restored_on_error(self.objective.model):
                    line = self._ghost.linearize(batch, gradients=gradients, dots=dots)
            except Unsupported as refused:
                self._choose(modes, self._fallback, "; ".join(refused.reasons))
            else:
                if dots:
                    self._choose(modes, self._ghost)
                return line
        return self._fallback.linearize(batch, gradients=gradients, dots=dots)

    def dots_from_scratch(
        self, batch: LabelledBatch, direction: Sequence[Tensor], rng: RngState
    ) -> Tensor:
        raise AssertionError("the chosen engine's linearization is asked")

    def _choose(self, modes: Modes, engine: Engine, why_not_ghost: str = "") -> None:
        if self._chosen.get(modes) is not engine:
            because = f", since ghost cannot: {why_not_ghost}" if why_not_ghost else ""
            logger.info("MTSStep: engine='auto' takes %s%s", engine.name, because)
            self._chosen[modes] = engine
