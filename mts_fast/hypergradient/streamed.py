"""A batch in micro-batches: the same results, memory for one micro-batch at a time.

The graph of a compiled or sharded model cannot be differentiated twice: its whole batch goes the
same way, as one micro-batch whose forward is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mts_fast._isolation import Restoring, RngState, SavedBuffers, preserved_rng
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.objective import LabelledBatch


class Streamed(Engine):
    """Any engine, `micro_batch` samples at a time.

    Nothing is kept between passes but B-vectors and one gradient: each gradient and the dots run
    every micro-batch forward again, with its own dropout masks. Buffers and generators move in the
    first pass alone, once per micro-batch. micro_batch None takes the whole batch at once.
    """

    def __init__(self, inner: Engine, micro_batch: int | None) -> None:
        super().__init__(inner.objective, inner.parameters)
        self.name = inner.name
        self.inner = inner
        self.micro_batch = micro_batch

    def reasons(self) -> list[str]:
        return self.inner.reasons()

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        whole = self.micro_batch is None or len(batch) <= self.micro_batch
        if whole and gradients <= self.objective.gradients_of_a_graph:
            return self.inner.linearize(batch, gradients=gradients, dots=dots)
        return StreamedLinearization(self, batch, gradients)


class StreamedLinearization(Linearization):
    """Passes over the micro-batches, one for each request."""

    engine: Streamed

    def __init__(self, engine: Streamed, batch: LabelledBatch, gradients: int) -> None:
        super().__init__(engine, batch, gradients)
        self._chunks = batch.split(engine.micro_batch)
        # generators and buffers before each micro-batch of the first pass
        self._starts: list[tuple[RngState, SavedBuffers]] = []
        self._losses: list[Tensor] = []

    def begin(self) -> None:
        self.run()  # the random state of each micro-batch is known only after the ones before it

    @property
    def losses(self) -> Tensor:
        if not self._losses:
            objective = self.engine.objective
            with torch.no_grad():
                self._losses = self._over_chunks(lambda k, chunk: objective.losses(chunk))
        return torch.cat(self._losses)

    def gradient(self, p: Tensor) -> list[Tensor | None]:
        self._count_gradient()
        parts = p.split(self.engine.micro_batch or len(p))
        total: list[Tensor | None] = [None] * len(self.engine.parameters)

        def add(k: int, chunk: LabelledBatch) -> Tensor:
            linearization = self.engine.inner.linearize(chunk, gradients=1, dots=False)
            for i, g in enumerate(linearization.gradient(parts[k])):
                old = total[i]
                total[i] = g if old is None else old if g is None else old + g
            return linearization.losses

        self._losses = self._over_chunks(add)
        return total

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        if not self._starts:
            _ = self.losses  # the first pass, which records the random state of each micro-batch
        inner = self.engine.inner
        return torch.cat(
            self._over_chunks(lambda k, chunk: inner.linearize(chunk, gradients=0).dots(direction))
        )

    def _over_chunks(self, run: Callable[[int, LabelledBatch], Tensor]) -> list[Tensor]:
        first = not self._starts
        results = []
        for k, chunk in enumerate(self._chunks):
            with self._leaving_trace() if first else self._replayed(k):
                results.append(run(k, chunk))
        return results

    @contextmanager
    def _leaving_trace(self) -> Iterator[None]:
        world = self.engine.objective.world
        self._starts.append((RngState.capture(world), SavedBuffers(world)))
        yield

    @contextmanager
    def _replayed(self, k: int) -> Iterator[None]:
        world = self.engine.objective.world
        rng, buffers = self._starts[k]
        now = SavedBuffers(world)
        with preserved_rng(world, rng), Restoring(now.restore, buffers.restore):
            yield
