"""What a sampled step rests on: samples that can be taken apart, and do not act on each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import (
    RngState,
    SavedBuffers,
    preserved_buffers,
    preserved_rng,
    training_mode,
)
from mts_fast.hypergradient import LabelledBatch, Linearization, Objective
from mts_fast.training.sampled.part import Sampled

OP = "MTSStep"


def check_divisible(batch: LabelledBatch) -> None:
    """Refuse inputs of which some samples cannot be taken: lists and arrays of one entry each."""
    entry = _undivided(batch.inputs, len(batch))
    if entry is not None:
        hint = "pass tensors, or leave compute= out"
        fail(TypeError, OP, "inputs", "made of tensors where samples are drawn", entry, hint)


def _undivided(nest: Any, size: int) -> str | None:
    """A part of the inputs that has an entry for each sample and is no tensor."""
    if isinstance(nest, Tensor | str | bytes):
        return None
    if isinstance(nest, Mapping):
        parts = (_undivided(value, size) for value in nest.values())
        return next((part for part in parts if part), None)
    if isinstance(nest, tuple | list) and any(isinstance(x, Tensor) for x in nest):
        return next((part for x in nest if (part := _undivided(x, size))), None)
    if hasattr(nest, "__len__") and hasattr(nest, "__getitem__"):
        if isinstance(nest, tuple | list) and nest and isinstance(nest[0], tuple | list | Mapping):
            inside = next((part for x in nest if (part := _undivided(x, size))), None)
            if inside is not None:
                return inside
        try:
            return f"a {type(nest).__name__} of {size}" if len(nest) == size else None
        except TypeError:  # an array without axes
            return None
    return None


def check_independent(
    objective: Objective, part: Sampled, linearization: Linearization, before: SavedBuffers
) -> None:
    """Refuse a model whose losses depend on which other samples are run.

    Half of the computed samples run again, from the buffers of `before`: in the model's modes where
    nothing is drawn at random there, and in eval mode. Waits for the device.
    """
    samples = part.batch
    world = objective.world
    half = samples.at(slice(0, max(1, len(samples) // 2)))

    def run(batch: LabelledBatch) -> tuple[Tensor, bool]:
        """Losses, and whether generators were moved."""
        with torch.no_grad(), preserved_rng(world), preserved_buffers(world):
            before.restore()
            start = RngState.capture(world)
            losses = objective.losses(batch)
            return losses, not start.equals(RngState.capture(world))

    again, draws = run(half)
    if not draws:
        _compare(linearization.losses[: len(half)], again, len(half))
        if part.has_statistics:
            _compare_stages(part.losses_of_stage_1, linearization.losses)
    several = part.independent_in_eval_mode
    if several is None:
        return
    with training_mode(world, False):
        whole, draws = run(several)
        if not draws:
            few = several.at(slice(0, len(several) // 2))
            _compare(whole[: len(few)], run(few)[0], len(few))


def _compare(losses: Tensor, alone: Tensor, count: int) -> None:
    gap = float((losses - alone).norm())
    if gap > _rounding(losses):
        hint = "leave compute= out, or put such layers into eval mode"
        got = f"losses of {count} samples that differ by {gap:.1e} when these are run alone"
        expected = "one whose samples do not act on each other, but by BatchNorm"
        fail(RuntimeError, OP, "model", expected, got, hint)


def _compare_stages(looked_at: Tensor, computed: Tensor) -> None:
    gap = float((looked_at - computed).norm())
    if gap > _rounding(computed):
        hint = "leave compute= out, or put BatchNorm into eval mode"
        got = f"losses that differ by {gap:.1e} from those of all candidates"
        expected = "one whose BatchNorm layers take statistics that are known"
        fail(RuntimeError, OP, "model", expected, got, hint)


def _rounding(losses: Tensor) -> float:
    """How far two ways of computing losses may differ."""
    return float(torch.finfo(losses.dtype).eps ** 0.5 * (1 + losses.norm()))
