"""Norms of every sample's gradient from one forward and one backward of input gradients."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.engine import Ghost
from mts_fast.hypergradient.ghost.linearization import LowMemoryLinearization
from mts_fast.hypergradient.ghost.parts import DensePart, GradientPart, inner
from mts_fast.hypergradient.ghost.reasons import Unsupported
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.sample_check import failure_named
from mts_fast.hypergradient.ghost.sample_parts import sample_parts
from mts_fast.hypergradient.ghost.source import DerivedTensors, ParameterSource
from mts_fast.hypergradient.objective import LabelledBatch

# entries of all samples' gradients by one parameter: 512 MiB in float32
MOST_ENTRIES = 2**27

# parameter -> the parts of its gradients
Parts = dict[Tensor, list[tuple[ParameterSource, GradientPart]]]


def gradient_norms(engine: Ghost, batch: LabelledBatch) -> Tensor:
    """||grad l_i|| [B] over all of the engine's parameters.

    Raises:
        Unsupported: the model mixes samples, or uses parameters in ways that cannot be taken apart.
    """
    linearization = engine.linearize(batch, gradients=0)
    assert isinstance(linearization, LowMemoryLinearization)
    if linearization.remainder:
        raise Unsupported(engine.left.values())
    derived = linearization.derived
    leaves = {id(leaf) for leaf in derived.leaves}
    behind = {id(p) for p in derived.reached()}
    times = linearization.times_used()
    squares = torch.zeros_like(linearization.losses)
    several: Parts = defaultdict(list)
    of_leaves: dict[Tensor, Tensor] = {}

    def add(use: RecordedCall, axis: SampleAxis, b: Tensor) -> None:
        with failure_named(use):
            parts = sample_parts(use, axis, b, len(batch))
        for name, part in parts.items():
            source = use.sources[name]
            root = source.root
            if id(root) in leaves:
                _check_size(len(batch) * root.numel(), use.path)
                rows = _pulled_back([(source, part)])
                of_leaves[root] = of_leaves[root] + rows if root in of_leaves else rows
            elif times[root] > 1 or source.maps or id(root) in behind:
                several[root].append((source, part))
            else:
                squares.add_(part.squares().to(squares.dtype))

    linearization.visit(add)
    for parameter, rows in _pulled_through(derived, of_leaves, engine, len(batch)).items():
        several[parameter].append(
            (ParameterSource(parameter), DensePart(rows.reshape(len(rows), -1)))
        )
    for parameter, parts in several.items():
        squares += _square(parts, engine.names[parameter]).to(squares.dtype)
    return squares.clamp(min=0).sqrt()


def _pulled_through(
    derived: DerivedTensors, of_leaves: dict[Tensor, Tensor], engine: Ghost, size: int
) -> dict[Tensor, Tensor]:
    """Every sample's gradients of the parameters behind derived tensors, [B, *parameter]."""
    rows: dict[Tensor, list[Tensor]] = defaultdict(list)
    for i in range(size if of_leaves else 0):
        of_sample = derived.pull_back({leaf: g[i] for leaf, g in of_leaves.items()})
        for parameter, g in zip(engine.parameters, of_sample, strict=True):
            if g is not None:
                _check_size(size * parameter.numel(), engine.names[parameter])
                rows[parameter].append(g)
    return {parameter: torch.stack(gradients) for parameter, gradients in rows.items()}


def _check_size(entries: int, path: str) -> None:
    if entries > MOST_ENTRIES:
        raise Unsupported([f"{path}: gradients of all samples, which do not fit into memory"])


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
        source.pullback(torch.ones_like(source.image(source.root.detach()))) for source, _ in parts
    )
    if float(torch.as_tensor(uses_of_entries).max()) <= 1:
        return sum((part.squares() for _, part in parts[1:]), parts[0][1].squares())
    _check_size(len(parts[0][1].squares()) * parts[0][0].root.numel(), path)
    return _pulled_back(parts).square().reshape(len(parts[0][1].squares()), -1).sum(1)


def _pulled_back(parts: list[tuple[ParameterSource, GradientPart]]) -> Tensor:
    """Every sample's gradient of the parameter itself, [B, *parameter]."""
    total = []
    for source, part in parts:
        shape = source.image(source.root.detach()).shape
        total.append(torch.stack([source.pullback(g.view(shape)) for g in part.dense()]))
    return sum(total[1:], total[0])
