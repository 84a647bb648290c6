"""All engines against one backward per sample, in float64, on a model and batch of the user's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import check_module, fail
from mts_fast._isolation import RngState, preserved_rng
from mts_fast.hypergradient.choice import ENGINES
from mts_fast.hypergradient.engine import dense
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.in_double import in_double
from mts_fast.hypergradient.nests import map_tensors
from mts_fast.hypergradient.objective import LabelledBatch, Loss, Objective
from mts_fast.hypergradient.refused import Refused

# largest errors in float64. Exact engines only round (observed 1e-15). A central difference with
# its step of 1.2e-5 was seen at 3e-10 on smooth models, and errs by the step itself where a kink
# (ReLU) lies within it.
EXACT, DIFFERENCES = 1e-9, 1e-4
# the same in float32 (observed up to 2e-5, and 7e-3 of differences)
EXACT_32_BIT, DIFFERENCES_32_BIT = 1e-3, 5e-2
ALLOWED = {
    torch.float64: dict.fromkeys(ENGINES, EXACT) | {FiniteDifference.name: DIFFERENCES},
    torch.float32: dict.fromkeys(ENGINES, EXACT_32_BIT)
    | {FiniteDifference.name: DIFFERENCES_32_BIT},
}


@dataclass(frozen=True)
class EngineCheck:
    """Largest relative errors by engine; None where the engine does not apply, for the reasons of
    `refusals`. In float64, or in float32 where the model does not run in float64 (`why_float32`).
    """

    dots: dict[str, float | None]
    gradients: dict[str, float | None]
    refusals: dict[str, list[str]]
    dtype: torch.dtype = torch.float64
    why_float32: str = ""

    @property
    def ok(self) -> bool:
        """Whether every engine that serves is as exact as it should be."""
        return all(
            error <= ALLOWED[self.dtype][name]
            for errors in (self.dots, self.gradients)
            for name, error in errors.items()
            if error is not None
        )

    def __str__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        lines = [f"largest relative error in {precision}, against one backward per sample"]
        if self.why_float32:
            lines.append(f"  (in float64 the model fails: {self.why_float32})")
        for name, error in self.dots.items():
            if error is None:
                first, *more = self.refusals[name]
                others = f" (and {len(more)} reasons more)" if more else ""
                lines.append(f"  {name:<18} not applicable: {first}{others}")
            else:
                state = f"dots {error:.1e}, gradients {self.gradients[name]:.1e}"
                lines.append(f"  {name:<18} {state} (allowed {ALLOWED[self.dtype][name]:.0e})")
        return "\n".join([*lines, "ok" if self.ok else "NOT ok"])


def check_engine(
    model: nn.Module, inputs: Any, labels: Tensor, *, loss: Loss | None = None, seed: int = 0
) -> EngineCheck:
    """Compare every engine's d_i and weighted gradients with autograd's, in float64.

    What the model asks to have in float32 or 16 bits is float64 there, too. Where it cannot run in
    float64 (a kernel without it), all is compared in float32.

    Args:
        model: any module; a deep copy of it is run, in its present modes.
        inputs, labels: a batch as for `MTSStep`; a few samples are enough, each costs a backward.
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits without.
        seed: of the direction, the weights and the dropout masks.

    Returns:
        An `EngineCheck`; `.ok`, and a table as `str()`. An engine that cannot serve, or that fails,
        is in `.refusals` with torch's reason.

    Raises:
        ValueError: a model without trainable parameters, a loss that is not per sample.
        TypeError: an output that holds no logits.

    Source: row 6.

    Example:
        >>> import torch, mts_fast
        >>> x, y = torch.randn(4, 3), torch.zeros(4).long()
        >>> mts_fast.check_engine(torch.nn.Linear(3, 2), x, y).ok
        True
    """
    check_module("check_engine", "model", model)
    if not any(p.requires_grad for p in model.parameters()):
        hint = "set requires_grad"
        fail(ValueError, "check_engine", "model", "given trainable parameters", "none", hint)
    with preserved_rng(model):
        try:
            with in_double():
                return _compared(model, inputs, labels, loss, seed, torch.float64)
        except (RuntimeError, NotImplementedError) as error:
            try:
                check = _compared(model, inputs, labels, loss, seed, torch.float32)
            except Exception:
                raise error from None  # it fails in every precision
            return replace(check, dtype=torch.float32, why_float32=_first_line(error))


def _compared(
    model: nn.Module, inputs: Any, labels: Tensor, loss: Loss | None, seed: int, dtype: torch.dtype
) -> EngineCheck:
    batch = LabelledBatch(_cast(inputs, dtype), _cast(labels, dtype))
    twin = _copied(model).to(dtype)
    objective = Objective(twin, loss, op="check_engine")
    parameters: list[Tensor] = [p for p in twin.parameters() if p.requires_grad]
    torch.manual_seed(seed)
    direction = [torch.randn_like(p) for p in parameters]
    weights = list(torch.rand(2, len(batch), dtype=dtype, device=labels.device))
    start = RngState.capture(parameters)
    buffers = copy.deepcopy(dict(twin.named_buffers()))

    def rewound() -> None:
        start.restore()
        for name, buffer in twin.named_buffers():
            buffer.data.copy_(buffers[name])

    rewound()
    losses = objective.losses(batch)
    gradients = [
        dense(torch.autograd.grad(losses, parameters, p, retain_graph=True, allow_unused=True))
        for p in weights
    ]
    # no step asks for a direction along entries that get no gradient (a padding row)
    direction = [
        torch.zeros_like(v) if g is None else v * (g != 0)
        for v, g in zip(direction, gradients[0], strict=True)
    ]
    truth = _true_dots(losses, parameters, direction)
    del losses
    check = EngineCheck({}, {}, {}, dtype)
    for name, kind in ENGINES.items():
        rewound()
        engine = kind(objective, parameters)
        check.dots[name] = check.gradients[name] = None
        why = engine.reasons()
        if why:
            check.refusals[name] = why
            continue
        try:
            linearization = engine.linearize(batch)
            results = [linearization.gradient(weights[0])]
            dots = linearization.dots(direction)
            results.append(linearization.gradient(weights[1]))
        except Refused as refused:
            check.refusals[name] = refused.reasons
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            check.refusals[name] = [_first_line(error)]
        else:
            check.dots[name] = _error([dots], [truth])
            pairs = zip(results, gradients, strict=True)
            check.gradients[name] = max(_error(result, g) for result, g in pairs)
    return check


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; of tensors with a graph that modules keep (weight_norm's) their values alone."""
    with_graph = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, with_graph)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *text])


def _true_dots(losses: Tensor, parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Tensor:
    """d_i = <direction, autograd's gradient of l_i> [B]."""
    dots = []
    for loss in losses:
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(dense(gradient), direction, strict=True)
        dots.append(torch.stack([(g * v).sum() for g, v in pairs if g is not None]).sum())
    return torch.stack(dots)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return map_tensors(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _error(results: Any, truth: Any) -> float:
    """Largest error over the largest entry of the truth, over all tensors together."""
    pairs = [
        (torch.zeros_like(g) if f is None else f, torch.zeros_like(f) if g is None else g)
        for f, g in zip(results, truth, strict=True)
        if not (f is None and g is None)
    ]
    gap = max((float((f - g).abs().max()) for f, g in pairs if g.numel()), default=0.0)
    scale = max((float(g.abs().max()) for _, g in pairs if g.numel()), default=0.0)
    return gap / scale if scale else gap
