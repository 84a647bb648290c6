"""Engines for the hypergradient dots (row 6), and the functional form of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mts_fast._check import check_choice, check_positive_int, fail
from mts_fast.hypergradient.auto import Auto
from mts_fast.hypergradient.check import EngineCheck, check_engine
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.explain import EngineExplanation, explain_engine
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.forward_mode import ForwardMode
from mts_fast.hypergradient.ghost import Ghost, LayerCall, register_layer
from mts_fast.hypergradient.gradient_norm import GradientNorm
from mts_fast.hypergradient.objective import LabelledBatch, Loss, Objective
from mts_fast.hypergradient.streamed import Streamed

ENGINES: dict[str, type[Engine]] = {e.name: e for e in (Ghost, FiniteDifference, ForwardMode)}
MEMORY = ("fast", "low")

__all__ = [
    "ENGINES",
    "Engine",
    "EngineCheck",
    "EngineExplanation",
    "GradientNorm",
    "LabelledBatch",
    "LayerCall",
    "Linearization",
    "Loss",
    "Objective",
    "check_engine",
    "explain_engine",
    "hypergradient_dots",
    "make_engine",
    "register_layer",
]


def make_engine(
    name: str,
    objective: Objective,
    parameters: Sequence[Tensor],
    *,
    memory: str = "fast",
    micro_batch: int | None = None,
) -> Engine:
    """The engine of that name, or the reasons why it cannot serve the model.

    `memory` is about the ghost engine alone; with `micro_batch` the engine is given that many
    samples at a time.
    """
    check_choice("MTSStep", "engine", name, ("auto", *ENGINES))
    check_choice("MTSStep", "memory", memory, MEMORY)
    if micro_batch is not None:
        check_positive_int("MTSStep", "micro_batch", micro_batch)
    engine: Engine
    if name == "auto":
        engine = Auto(objective, parameters, memory=memory)
    elif name == Ghost.name:
        engine = Ghost(objective, parameters, memory=memory)
    else:
        engine = ENGINES[name](objective, parameters)
    why = engine.reasons()
    if why:
        expected = "able to serve the model"
        hint = "engine='auto' takes one that serves the model"
        fail(RuntimeError, "MTSStep", "engine", expected, repr(name), "; ".join([*why, hint]))
    return engine if micro_batch is None else Streamed(engine, micro_batch)


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
        engine: "auto", "ghost", "finite_difference" or "forward_mode".
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
    named = dict(model.named_parameters())
    if not direction:
        fail(ValueError, "hypergradient_dots", "direction", "non-empty", direction)
    unknown = sorted(set(direction) - set(named))
    if unknown:
        fail(
            ValueError, "hypergradient_dots", "direction", "of the model's parameters", unknown[:3]
        )
    for name, value in direction.items():
        if value.shape != named[name].shape:
            expected = f"of shape {tuple(named[name].shape)}"
            fail(
                ValueError,
                "hypergradient_dots",
                f"direction[{name!r}]",
                expected,
                tuple(value.shape),
            )
    parameters = [named[name] for name in direction]
    chosen = make_engine(engine, Objective(model, loss), parameters)
    return chosen.dots(LabelledBatch(inputs, labels), list(direction.values()))
