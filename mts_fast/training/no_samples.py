"""The forward of a rank that has no samples of a batch: it is not run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast.hypergradient import Engine, LabelledBatch, Linearization


class NoSamples(Linearization):
    """No losses, and no gradient."""

    def __init__(self, engine: Engine, batch: LabelledBatch) -> None:
        super().__init__(engine, batch, gradients=0)

    @property
    def losses(self) -> Tensor:
        """[0]."""
        return self.batch.labels.new_empty(0, dtype=self.engine.parameters[0].dtype)

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        """None of any parameter."""
        return [None] * len(self.engine.parameters)

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        """[0]."""
        return self.losses
