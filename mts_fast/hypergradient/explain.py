"""Which engine serves a model, and why: the reasons of the automatic choice, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mts_fast._check import check_module, fail
from mts_fast._isolation import preserved_buffers, preserved_rng
from mts_fast.hypergradient.choice import ENGINES, make_engine
from mts_fast.hypergradient.engine import Engine
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.objective import LabelledBatch, Loss, Objective
from mts_fast.hypergradient.refused import Refused


@dataclass(frozen=True)
class ParameterUse:
    """One trainable parameter and how the ghost engine sees it."""

    path: str
    shape: tuple[int, ...]
    seen_as: str  # "linear", "conv2d x2", "derived, linear", or the module that owns it


@dataclass(frozen=True)
class EngineExplanation:
    """Engine -> reasons why it cannot serve; the parameters; and what "auto" takes."""

    choice: str
    reasons: dict[str, list[str]]
    parameters: list[ParameterUse] = field(default_factory=list)
    with_batch: bool = False
    # parameters that ghost leaves to the second derivative of the graph, and why
    left_over: dict[str, str] = field(default_factory=dict)

    @property
    def ghost_share(self) -> float:
        """The share of the parameters' entries that ghost serves itself; 0 where it refuses."""
        if self.reasons.get("ghost"):
            return 0.0
        entries = {p.path: math.prod(p.shape) for p in self.parameters}
        return 1 - sum(entries[path] for path in self.left_over) / sum(entries.values())

    def __str__(self) -> str:
        width = max((len(p.path) for p in self.parameters), default=0)
        lines = [
            f"  {p.path:<{width}}  {'x'.join(map(str, p.shape)) or 'scalar':<14}  {p.seen_as}"
            for p in self.parameters
        ]
        for engine, why in self.reasons.items():
            lines.append(f"{engine}: {'cannot serve' if why else 'serves'}")
            lines += [f"  - {reason}" for reason in why]
            if engine == "ghost" and self.left_over:
                share = 100 * self.ghost_share
                lines.append(
                    f"  {share:.1f} % of the entries; the rest by double backward on the same"
                    " graph, which costs up to 3 forwards more (register_layer would serve it):"
                )
                lines += [f"  - {why}" for why in sorted(set(self.left_over.values()))]
        if not self.with_batch:
            lines.append("what a forward shows is not known: give inputs and labels")
        return "\n".join(["trainable parameters", *lines, f"engine='auto' takes {self.choice}"])


def explain_engine(
    model: nn.Module,
    inputs: Any = None,
    labels: Tensor | None = None,
    *,
    loss: Loss | None = None,
) -> EngineExplanation:
    """Which engine `engine="auto"` takes for a model in its present modes, with all reasons.

    Args:
        model: any module; its trainable parameters are those that require gradients.
        inputs, labels: a batch, as for `MTSStep`. Without one only what shows without a forward is
            known: BatchNorm in train mode, torch.compile, RNNs.
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits without.

    Returns:
        An `EngineExplanation`; `str()` of it is a table.

    Raises:
        ValueError: a model without trainable parameters, inputs without labels, a loss that is not
            per sample.
        TypeError: an output that holds no logits.

    Notes:
        Parameters, buffers, modes and random generators are left as they were.

    Source: docs/engines.md.

    Example:
        >>> import torch, mts_fast
        >>> mts_fast.explain_engine(torch.nn.Linear(3, 2)).choice
        'ghost'
    """
    if (inputs is None) != (labels is None):
        expected, hint = "both given, or neither", "pass the other one, too"
        fail(ValueError, "explain_engine", "inputs and labels", expected, "one", hint)
    check_module("explain_engine", "model", model)
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        hint = "set requires_grad"
        fail(ValueError, "explain_engine", "model", "given trainable parameters", "none", hint)
    objective = Objective(model, loss, op="explain_engine")
    parameters = list(named.values())
    ghost = Ghost(objective, parameters)
    why = ghost.reasons()
    seen, final = _owners(model), False
    left: dict[str, str] = {}
    if labels is not None:
        batch = LabelledBatch(inputs, labels)
        calls, more, final = _uses(ghost, batch)
        left = {ghost.names[p]: reason for p, reason in ghost.left.items()}
        seen |= calls
        refused = {reason.partition(":")[0] for reason in why}  # modules: what they call is moot
        why = sorted({*why, *(r for r in more if r.partition(":")[0] not in refused)})
    reasons = {"ghost": why} if not final else dict.fromkeys(ENGINES, why)
    for name in [] if final else list(ENGINES)[1:]:
        engine = make_engine(name, objective, parameters)
        reasons[name] = engine.reasons()
        if labels is not None and not reasons[name]:
            reasons[name] = _tried(engine, LabelledBatch(inputs, labels))
    uses = [ParameterUse(n, tuple(p.shape), seen.get(n, "not used")) for n, p in named.items()]
    choice = next((name for name, against in reasons.items() if not against), "none")
    return EngineExplanation(choice, reasons, uses, labels is not None, left)


def _tried(engine: Engine, batch: LabelledBatch) -> list[str]:
    """Why an engine cannot give dots of a batch, by asking it along the parameters themselves."""
    try:
        engine.dots(batch, [p.detach() for p in engine.parameters])
    except Refused as refused:
        return refused.reasons
    return []


def _owners(model: nn.Module) -> dict[str, str]:
    """Path of each parameter -> the type of the module that holds it."""
    return {
        f"{path}.{name}".lstrip("."): f"in {type(module).__name__}"
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def _uses(ghost: Ghost, batch: LabelledBatch) -> tuple[dict[str, str], list[str], bool]:
    """How each parameter is used in a forward of the batch, all reasons against ghost, and whether
    they are reasons against every engine."""
    final = False
    world = ghost.objective.world
    with preserved_rng(world), preserved_buffers(world):
        capture = ghost.capture(batch)
        try:
            with capture:
                ghost.objective.losses(batch)
            reasons = list(capture.reasons) if ghost.reasons() else []
            if not ghost.reasons():
                ghost.linearize(batch, gradients=0)
        except Refused as refused:
            reasons = [*capture.reasons, *refused.reasons]
            final = refused.final
    calls: dict[str, list[str]] = {path: [] for path in ghost.names.values()}
    derived = {id(d.leaf): d.paths for d in capture.derived}
    for use in capture.recorded:
        kind = "entries per sample" if use.call is None else use.call.rule.function.__name__
        for source in use.sources.values():
            if id(source.root) in derived:
                for path in derived[id(source.root)]:
                    calls[path].append(f"derived, {kind}")
            else:
                calls[ghost.names[source.root]].append(kind)
    return {path: _counted(kinds) for path, kinds in calls.items()}, reasons, final


def _counted(kinds: Sequence[str]) -> str:
    if not kinds:
        return "no call that can be replayed"
    times = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(kind if n == 1 else f"{kind} x{n}" for kind, n in times.items())
