"""Norms of every sample's gradient from one forward and one backward of input gradients."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.engine import Ghost
from mts_fast.hypergradient.ghost.linearization import LowMemoryLinearization
from mts_fast.hypergradient.ghost.parts import GradientPart, inner
from mts_fast.hypergradient.ghost.recorded import RecordedCall, Unsupported
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.sample_check import failure_named
from mts_fast.hypergradient.ghost.sample_parts import sample_parts
from mts_fast.hypergradient.ghost.source import ParameterSource
from mts_fast.hypergradient.objective import LabelledBatch

# entries of all samples' gradients by one parameter: 512 MiB in float32
MOST_ENTRIES = 2**27


def gradient_norms(engine: Ghost, batch: LabelledBatch) -> Tensor:
    """||grad l_i|| [B] over all of the engine's parameters.

    Raises:
        Unsupported: the model mixes samples, or uses parameters in ways that cannot be taken apart.
    """
    linearization = engine.linearize(batch, gradients=0)
    assert isinstance(linearization, LowMemoryLinearization)
    times = linearization.times_used()
    squares = torch.zeros_like(linearization.losses)
    several: dict[Tensor, list[tuple[ParameterSource, GradientPart]]] = defaultdict(list)

    def add(use: RecordedCall, axis: SampleAxis, b: Tensor) -> None:
        with failure_named(use):
            parts = sample_parts(use, axis, b, len(batch))
        for name, part in parts.items():
            source = use.sources[name]
            if times[source.parameter] > 1 or source.maps:
                several[source.parameter].append((source, part))
            else:
                squares.add_(part.squares().to(squares.dtype))

    linearization.visit(add)
    for parameter, parts in several.items():
        squares += _square(parts, engine.names[parameter]).to(squares.dtype)
    return squares.clamp(min=0).sqrt()


def _square(parts: list[tuple[ParameterSource, GradientPart]], path: str) -> Tensor:
    """Squared norm [B] of the sum of several parts of one parameter."""
    if not any(source.maps for source, _ in parts):
        total = sum((part.squares() for _, part in parts[1:]), parts[0][1].squares())
        for i, (_, x) in enumerate(parts):
            for _, y in parts[:i]:
                total = total + 2 * inner(x, y)
        return total
    # views: where no entry of the parameter is used twice, the parts are orthogonal
    uses_of_entries = sum(
        source.pullback(torch.ones_like(source.image(source.parameter.detach())))
        for source, _ in parts
    )
    if float(torch.as_tensor(uses_of_entries).max()) <= 1:
        return sum((part.squares() for _, part in parts[1:]), parts[0][1].squares())
    entries = len(parts[0][1].squares()) * parts[0][0].parameter.numel()
    if entries > MOST_ENTRIES:
        raise Unsupported([f"{path}: views of it that overlap are used in several calls"])
    return _pulled_back(parts).square().flatten(1).sum(1)


def _pulled_back(parts: list[tuple[ParameterSource, GradientPart]]) -> Tensor:
    """Every sample's gradient of the parameter itself, [B, *parameter]."""
    total = []
    for source, part in parts:
        shape = source.image(source.parameter.detach()).shape
        total.append(torch.stack([source.pullback(g.view(shape)) for g in part.dense()]))
    return sum(total[1:], total[0])
