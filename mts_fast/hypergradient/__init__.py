"""Engines for the hypergradient dots (row 6), and the functional form of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mts_fast._check import check_floating, check_module, describe, fail
from mts_fast.hypergradient.check import EngineCheck, check_engine
from mts_fast.hypergradient.choice import ENGINES, EngineChoice, make_engine
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.explain import EngineExplanation, explain_engine
from mts_fast.hypergradient.ghost import (
    DensePart,
    LayerCall,
    OuterPart,
    SampleAxis,
    ScatteredPart,
    register_layer,
)
from mts_fast.hypergradient.gradient_norm import GradientNorm
from mts_fast.hypergradient.objective import LabelledBatch, Loss, Objective
from mts_fast.hypergradient.refused import Refused
from mts_fast.hypergradient.streamed import Streamed

__all__ = [
    "ENGINES",
    "DensePart",
    "Engine",
    "EngineCheck",
    "EngineChoice",
    "EngineExplanation",
    "GradientNorm",
    "LabelledBatch",
    "LayerCall",
    "Linearization",
    "Loss",
    "Objective",
    "OuterPart",
    "Refused",
    "SampleAxis",
    "ScatteredPart",
    "Streamed",
    "check_engine",
    "explain_engine",
    "hypergradient_dots",
    "make_engine",
    "register_layer",
]


def hypergradient_dots(
    model: nn.Module,
    inputs: Any,
    labels: Tensor,
    direction: Mapping[str, Tensor],
    *,
    engine: str = "auto",
    loss: Loss | None = None,
) -> Tensor:
    """How fast each sample's loss grows along a direction in parameter space.

    d_i = <direction, grad l_i(theta)>; with direction = kappa * v this is row 6.

    Args:
        model: any module, in the mode in which the losses are wanted.
        inputs: a tensor, a tuple (`model(*inputs)`) or a dict (`model(**inputs)`).
        labels: [B] or [B, T], what the loss takes.
        direction: a tensor of each named parameter's shape; parameters left out count as 0.
        engine: "auto", "ghost", "forward_mode", "double_backward" or "finite_difference".
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits without.

    Returns:
        d [B]. Parameters, buffers and random generators are left bitwise as they were.

    Raises:
        ValueError: an empty direction, unknown parameter names, differing shapes, or a loss that is
            not per sample.
        RuntimeError: an engine that cannot serve the model, with every reason.

    Source: row 6.

    Example:
        >>> import torch, mts_fast
        >>> model = torch.nn.Linear(3, 2)
        >>> v = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 0])
        >>> mts_fast.hypergradient_dots(model, x, y, v, engine="forward_mode").shape
        torch.Size([5])
    """
    op = "hypergradient_dots"
    named = dict(check_module(op, "model", model).named_parameters())
    if not isinstance(direction, Mapping) or not direction:
        hint = "pass {name: tensor} with names of model.named_parameters()"
        fail(ValueError, op, "direction", "a non-empty mapping", describe(direction), hint)
    unknown = sorted(set(direction) - set(named))
    if unknown:
        hint = "take names from model.named_parameters()"
        fail(ValueError, op, "direction", "of the model's parameters", unknown[:3], hint)
    for name, value in direction.items():
        check_floating(op, f"direction[{name!r}]", value)
        if value.shape != named[name].shape:
            expected = f"of shape {tuple(named[name].shape)}"
            hint = "give one entry per entry of the parameter"
            got = tuple(value.shape)
            fail(ValueError, op, f"direction[{name!r}]", expected, got, hint)
    parameters = [named[name] for name in direction]
    choice = EngineChoice(Objective(model, loss, op=op), parameters, engine, op=op)
    return choice.dots(LabelledBatch(inputs, labels), list(direction.values()))
