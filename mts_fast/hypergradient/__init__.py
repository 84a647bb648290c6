"""Engines for the hypergradient dots (row 6), and the functional form of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mts_fast._check import check_choice, fail
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.forward_mode import ForwardMode
from mts_fast.hypergradient.objective import Loss, Objective

ENGINES: dict[str, type[Engine]] = {e.name: e for e in (FiniteDifference, ForwardMode)}

__all__ = [
    "ENGINES",
    "Engine",
    "Linearization",
    "Loss",
    "Objective",
    "hypergradient_dots",
    "make_engine",
]


def make_engine(name: str, objective: Objective, parameters: Sequence[Tensor]) -> Engine:
    """The engine of that name ("auto": finite_difference), or the reasons why it cannot serve."""
    check_choice("MTSStep", "engine", name, ("auto", *ENGINES))
    engine = ENGINES["finite_difference" if name == "auto" else name](objective, parameters)
    why = engine.reasons()
    if why:
        hint = "use engine='finite_difference', which serves every model"
        fail(
            RuntimeError,
            "MTSStep",
            "engine",
            "able to serve the model",
            repr(name),
            "; ".join([*why, hint]),
        )
    return engine


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
        engine: "auto", "finite_difference" or "forward_mode".
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
    return chosen.dots(inputs, labels, list(direction.values()))
