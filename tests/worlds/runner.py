"""Runs one world: every call against the truth, every refusal against the state before it.

The only file of this folder that imports mts_fast.
"""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import mts_fast
from worlds.builders import HIDDEN, Batch, Objects, build, draw_batch, features_dtype, happen
from worlds.compare import EPS, Call, Comparison
from worlds.generators import Generators
from worlds.in_double import Snapshot
from worlds.oracle import Truth
from worlds.world import CLASSES, World

COMPUTED, REFUSED, WRONG, TORN, TRACEBACK = "computed", "refused", "wrong", "torn", "traceback"
# plain torch cannot run the world either: the generator's fault
IMPOSSIBLE = "impossible"
FAILURES = (WRONG, TORN, TRACEBACK, IMPOSSIBLE)
FORMAT = re.compile(r"^[^:\n]+: .+ must be .+, got .+", re.DOTALL)


@dataclass
class Report:
    """What became of a world."""

    verdict: str
    engines: list[str] = field(default_factory=list)  # that served, in order
    reason: str = ""  # of a refusal, or the traceback's last line
    faults: list[str] = field(default_factory=list)
    call: int = 0  # the call that it ended in
    noise: bool = False  # in a call rounding may be as large as the dots, which say nothing

    @property
    def signature(self) -> str:
        """The kind of a failure."""
        what = self.faults[0].split(":")[0] if self.faults else self.reason[:60]
        return f"{self.verdict} | {what} | {self.engines[-1] if self.engines else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def engine_of(step: mts_fast.MTSStep, result: Any) -> str:
    """The name of the engine that served the last call."""
    named = getattr(result, "engine", None)
    if isinstance(named, str):
        return named
    engine: Any = getattr(step, "_engine", None)
    engine = getattr(engine, "inner", engine)
    chosen = getattr(engine, "_chosen", None)
    if chosen:
        engine = list(chosen.values())[-1]
    return getattr(engine, "name", "unknown")


def run(world: World) -> Report:
    """All calls of a world, up to the first that does not compute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Run(world).report()


class _Run:
    def __init__(self, world: World) -> None:
        self.world = world
        self.objects = build(world, _selector)
        self.engines: list[str] = []
        self.running: dict[str, Tensor] = {}
        self.noise = False

    def report(self) -> Report:
        try:
            step = self._step()
        except Exception as error:
            return self._raised(error, -1, None, None)
        for call, event in enumerate(self.world.events):
            happen(event, self.world, self.objects)
            ended = self._call(step, call)
            if ended is not None:
                return ended
        return Report(COMPUTED, self.engines, call=self.world.calls - 1, noise=self.noise)

    def _step(self) -> mts_fast.MTSStep:
        options = dict(self.world.step)
        if options["class_weight"] is not None:
            weight = torch.tensor(options["class_weight"], dtype=features_dtype(self.world))
            options["class_weight"] = weight
        o = self.objects
        return mts_fast.MTSStep(
            o.model,
            o.optimizer,
            o.selector,
            o.selector_optimizer,
            loss=o.loss,
            selector_scheduler=o.scheduler,
            **options,
        )

    def _call(self, step: mts_fast.MTSStep, call: int) -> Report | None:
        world = self.world
        train = draw_batch(world, call, "train", world.batches["sizes"][call])
        val = draw_batch(world, call, "validation", world.batches["validation"])
        meta = None
        if world.batches["selector_batch"]:
            meta = draw_batch(world, call, "selector", world.batches["selector_batch"])
        before = Snapshot.take(world, self.objects, self.running, call)
        try:
            truth = Truth(before, train, val, meta, double=True)
            rounded = []
            if "16" in world.precision:
                # one error in 16 bits may be small by luck
                rounded = [
                    Truth(before, train, val, meta, double=True, rounded=(EPS[world.precision], k))
                    for k in range(4)
                ]
            plain = truth
            if world.precision != "float64":
                plain = Truth(before, train, val, meta, double=False)
        except Exception as error:
            return Report(IMPOSSIBLE, self.engines, _last_line(error), call=call)
        state = _state(self.objects)
        try:
            with _autocast(world):
                result = step(**_arguments(train.fresh(), val.fresh(), meta and meta.fresh()))
        except Exception as error:
            return self._raised(error, call, state, before.generators, step)
        self.engines.append(engine_of(step, result))
        comparison = Comparison(truth, plain, rounded, self.engines[-1])
        made = Call(result, self.objects, Generators.now(), self.engines[-1])
        faults = [str(fault) for fault in comparison.faults(made)]
        self.noise |= comparison.dots_are_noise
        if step.steps != call + 1:
            faults.append(f"steps: {step.steps}")
        self.running = truth.running
        return Report(WRONG, self.engines, "", faults, call) if faults else None

    def _raised(
        self,
        error: Exception,
        call: int,
        state: dict[str, Any] | None,
        generators: Generators | None,
        step: Any = None,
    ) -> Report:
        reason = _last_line(error)
        changed: list[str] = []
        if state is not None and generators is not None:
            after = _state(self.objects)
            changed = [n for n in state if n not in after or not _same(state[n], after[n])]
            changed += [n for n in after if n not in state]
            changed += [f"generator {n}" for n in Generators.now().moved_since(generators)]
            changed += [] if step.steps == call else ["steps"]
        if not (
            isinstance(error, TypeError | ValueError | RuntimeError) and FORMAT.match(str(error))
        ):
            frame = _package_frame(error)
            return Report(TRACEBACK, self.engines, f"{frame}: {reason}", changed, call)
        return Report(TORN if changed else REFUSED, self.engines, reason, changed, call)


def _selector(width: int) -> nn.Module:
    return mts_fast.Selector(width, CLASSES, hidden=(HIDDEN,))


def _autocast(world: World) -> Any:
    if not world.precision.startswith("autocast"):
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, world.precision.split()[1]))


def _arguments(train: Batch, val: Batch, meta: Batch | None) -> dict[str, Any]:
    arguments = {
        "inputs": train.inputs,
        "labels": train.labels,
        "features": train.features,
        "is_synthetic": train.is_synthetic,
        "classes": train.classes,
        "val_inputs": val.inputs,
        "val_labels": val.labels,
    }
    if meta is not None:
        arguments["selector_batch"] = mts_fast.SelectorBatch(
            meta.inputs, meta.labels, meta.features, meta.is_synthetic, meta.classes
        )
    return arguments


def _state(objects: Objects) -> dict[str, Any]:
    """Everything that a call that raises must leave alone, by name; tensors are copied."""
    snapshot: dict[str, Any] = {}
    modules = {"model": objects.model, "selector": objects.selector, "loss": objects.loss}
    for role, module in modules.items():
        if isinstance(module, nn.Module):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                snapshot[f"{role} {name}"] = tensor.detach().clone()
            for name, part in module.named_modules():
                snapshot[f"{role} mode {name}"] = part.training
    optimizers = {"optimizer": objects.optimizer, "selector optimizer": objects.selector_optimizer}
    for role, optimizer in optimizers.items():
        state = optimizer.state_dict()
        for key, entries in state["state"].items():
            for name, value in entries.items():
                value = value.clone() if isinstance(value, Tensor) else value
                snapshot[f"{role} state {key} {name}"] = value
        for k, group in enumerate(state["param_groups"]):
            for name, value in group.items():
                value = value.clone() if isinstance(value, Tensor) else value
                snapshot[f"{role} group {k} {name}"] = value
    if objects.scheduler is not None:
        snapshot["scheduler"] = objects.scheduler.last_epoch
    return snapshot


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:4000]


def _package_frame(error: Exception) -> str:
    """Where in mts_fast the error passed last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mts_fast/" in f.filename]
    if not ours:
        return "outside mts_fast"
    return f"{ours[-1].filename.rsplit('/mts_fast/', 1)[1]}:{ours[-1].name}"
