"""What one look at a few samples tells of a model: sample axes, mixing, uses that went unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast._isolation import preserved_buffers, preserved_rng
from mts_fast.hypergradient.ghost.capture import Capture, Recorded, Unsupported
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis, find_axis, rounding_share
from mts_fast.hypergradient.objective import LabelledBatch, Objective

# factors by which the samples are told apart: distinct, of both signs, and exact in any precision
SIGNS = (1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 8.0, -8.0)
# the sequence of recorded calls: function and number of axes of each
Layout = tuple[tuple[object, int], ...]


@dataclass(frozen=True)
class Probe:
    """Findings for one layout of calls."""

    layout: Layout
    axes: list[SampleAxis]
    final: bool  # False where a zero gradient left an axis open
    shared_rows: list[bool]  # see Capture


def layout_of(recorded: Sequence[Recorded]) -> Layout:
    """What a probe is valid for."""
    return tuple((r.call.rule.function if r.call else None, len(r.shape)) for r in recorded)


def probe(objective: Objective, names: dict[Tensor, str], batch: LabelledBatch) -> Probe:
    """Run the first samples of the batch forward, and backward twice; leaves no trace.

    Raises:
        Unsupported: samples are mixed, or a parameter has uses that were not recorded.
    """
    few = batch.split(len(SIGNS))[0]
    model = objective.model
    with preserved_rng(model), preserved_buffers(model):
        with Capture(names, len(few)) as capture:
            losses = objective.losses(few)
        if capture.reasons:
            raise Unsupported(capture.reasons)
        recorded = capture.recorded
        signs = torch.tensor(SIGNS[: len(few)], dtype=losses.dtype, device=losses.device)
        edges = [r.edge for r in recorded]
        signed_b = torch.autograd.grad(losses, edges, signs, retain_graph=True, allow_unused=True)
        parameters = list(names)
        found = torch.autograd.grad(
            losses, [*parameters, *edges], torch.ones_like(losses), allow_unused=True
        )
    b = list(found[len(parameters) :])
    axes, final, reasons = [], True, []
    for use, plain, signed in zip(recorded, b, signed_b, strict=True):
        axis: SampleAxis | None = SampleAxis()
        if plain is not None and signed is not None:
            axis = find_axis(plain, signed, signs)
            final = final and bool(signed.any())
        if axis is None:
            reasons.append(f"{use.path}: samples are mixed in, or after, the layer that uses it")
        axes.append(axis or SampleAxis())
    if not reasons:
        truth = dict(zip(parameters, found, strict=False))
        reasons = _missed_uses(recorded, b, truth, names)
    if reasons:
        raise Unsupported(reasons)
    return Probe(layout_of(recorded), axes, final, capture.shared_rows)


def sum_gradients(recorded: Sequence[Recorded], b: Sequence[Tensor | None]) -> dict[Tensor, Tensor]:
    """Gradients of the parameters from output cotangents alone."""
    total: dict[Tensor, Tensor] = {}
    for use, cotangent in zip(recorded, b, strict=True):
        if cotangent is None:
            continue
        for parameter, g in use.parameter_gradients(cotangent):
            g = g.to(parameter.dtype)
            total[parameter] = total[parameter] + g if parameter in total else g
    return total


def _missed_uses(
    recorded: Sequence[Recorded],
    b: Sequence[Tensor | None],
    truth: Mapping[Tensor, Tensor | None],
    names: dict[Tensor, str],
) -> list[str]:
    """Parameters whose book-kept gradient is not autograd's."""
    copied = sum_gradients(*_only_copies(recorded, b))
    kept = sum_gradients(recorded, b)
    # what the terms of each sum amount to where they do not cancel
    terms = sum_gradients(recorded, [None if g is None else g.abs() for g in b])
    allowed = max((rounding_share(g.dtype) for g in b if g is not None), default=0.0)
    reasons = []
    for parameter, path in names.items():
        # autograd does not see parameters that entered the graph as copies
        parts = [g for g in (truth[parameter], copied.get(parameter)) if g is not None]
        ours = kept.get(parameter)
        if bool(parts) != (ours is not None):
            reasons.append(f"{path} is used in a way that was not seen")
        elif ours is not None:
            true = sum(parts[1:], parts[0])
            if (true - ours).norm() > allowed * torch.maximum(true.norm(), terms[parameter].norm()):
                reasons.append(f"{path}: the calls that were seen do not make up its gradient")
    return reasons


def _only_copies(
    recorded: Sequence[Recorded], b: Sequence[Tensor | None]
) -> tuple[list[Recorded], list[Tensor | None]]:
    pairs = [(use, g) for use, g in zip(recorded, b, strict=True) if use.call is None]
    return [use for use, _ in pairs], [g for _, g in pairs]
