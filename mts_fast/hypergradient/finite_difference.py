"""Row 6 by central differences: two forwards without graphs, any model, coupled samples or not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from mts_fast._isolation import (
    RngState,
    preserved_buffers,
    preserved_rng,
)
from mts_fast.hypergradient.buffer_writes import RecordedWrites, ReplayedWrites, Written
from mts_fast.hypergradient.engine import Engine, Linearization, RetainedGraph
from mts_fast.hypergradient.frequency import FrequencyTables, frequency_reasons
from mts_fast.hypergradient.objective import LabelledBatch
from mts_fast.hypergradient.precision import low_precision_autocast
from mts_fast.ops.perturb import global_norm, perturb

# the error of a central difference with step h is a h^2 + b u / h (u the unit roundoff), smallest
# near h = cbrt(u) times the scale of the problem; 2 cbrt(u) is 1.0e-2 in float32, the step of the
# published code, and 1.2e-5 in float64.
STEP_OVER_CUBE_ROOT = 2.0


class FiniteDifference(Engine):
    """d_i = (l_i(theta + e v) - l_i(theta - e v)) / 2e with e = h / ||v||."""

    name = "finite_difference"

    def reasons(self) -> list[str]:
        # a forward in 16 bits rounds away what the small step changes: errors of 20 % were seen
        coarse = sorted({str(p.dtype) for p in self.parameters if torch.finfo(p.dtype).bits < 32})
        reasons = [f"differences of losses drown in rounding with {d} parameters" for d in coarse]
        if low_precision_autocast(self.parameters):
            reasons.append("differences of losses drown in rounding under 16-bit autocast")
        sharding = self.objective.sharding
        if sharding is not None and sharding.precision in (torch.bfloat16, torch.float16):
            reasons.append(f"differences drown where FSDP casts to {sharding.precision}")
        return reasons + frequency_reasons(self.objective)

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        return DifferenceLinearization(self, batch, gradients)

    def error_estimate(self, batch: LabelledBatch, direction: Sequence[Tensor]) -> Tensor:
        """Estimated error [B] of `dots`: its truncation error is a third of what doubling h adds.

        A ReLU kink between the two steps shows as a large value. Costs four forwards.
        """
        rng = RngState.capture(self.objective.world)
        tables = FrequencyTables(self.objective)
        fine = self.difference(batch, direction, rng, self._step(), [], tables)
        coarse = self.difference(batch, direction, rng, 2 * self._step(), [], tables)
        return (coarse - fine).abs() / 3

    def _step(self) -> float:
        widest = max((p.dtype for p in self.parameters), key=lambda d: torch.finfo(d).bits)
        return STEP_OVER_CUBE_ROOT * torch.finfo(widest).eps ** (1 / 3)

    def difference(
        self,
        batch: LabelledBatch,
        direction: Sequence[Tensor],
        rng: RngState,
        h: float,
        writes: Sequence[Written],
        tables: FrequencyTables,
    ) -> Tensor:
        """d [B] by a step of length h, buffers held at what the training forward wrote."""
        # the norm stays a tensor: no host synchronisation. A zero direction gives dots of zero.
        norm = global_norm(direction)
        sharding = self.objective.sharding
        if sharding is not None:
            norm = sharding.total(norm.square()).sqrt()
        epsilon = h / norm.clamp(min=torch.finfo(norm.dtype).tiny ** 0.5)
        world = self.objective.world
        here = [p.detach() for p in self.parameters]
        at = []
        for sign in (1.0, -1.0):
            moved = perturb(here, direction, sign * epsilon)
            with (
                torch.no_grad(),
                preserved_rng(world, rng),
                preserved_buffers(world),
                self.objective.replaced(self.parameters, moved),
                ReplayedWrites(world, writes) if writes else nullcontext(),
                tables.replaying(),
            ):
                at.append(self.objective.losses(batch))
        return (at[0] - at[1]) / (2 * epsilon)


class DifferenceLinearization(RetainedGraph):
    """The kept graph of the forward, and the values it wrote into buffers."""

    engine: FiniteDifference

    def __init__(self, engine: FiniteDifference, batch: LabelledBatch, gradients: int) -> None:
        self._tables = FrequencyTables(engine.objective)
        with RecordedWrites(engine.objective.world) as recorded, self._tables.recording():
            super().__init__(engine, batch, gradients)
        self._writes = recorded.values

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        engine, world = self.engine, self.engine.objective.world
        with self._rewound_buffers():
            if self._tables.unrecorded:
                with (
                    torch.no_grad(),
                    preserved_rng(world, self._rng),
                    preserved_buffers(world),
                    self._tables.recording(),
                ):
                    engine.objective.losses(self.batch)
            return engine.difference(
                self.batch, direction, self._rng, engine._step(), self._writes, self._tables
            )
