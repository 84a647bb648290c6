"""A step's state as a dict, and loading it: all is checked before anything is written."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import describe, fail
from mts_fast._sharding import is_sharded
from mts_fast.backends.verdicts.table import digests_for
from mts_fast.training.sampled.compute import STATE_TYPES
from mts_fast.training.step_parts import StepParts

logger = logging.getLogger("mts_fast")

OP = "MTSStep.load_state_dict"
VERSION = 2
# entries of version 1, whose states have no "version"
REQUIRED = {
    "model": Mapping,
    "optimizer": Mapping,
    "selector": Mapping,
    "selector_optimizer": Mapping,
    "selector_scheduler": (Mapping, type(None)),
    "online": Mapping,
    "steps": int,
}
# entries that version 2 added
ADDED = {
    "class_weight": (Tensor, type(None)),
    "engines": Mapping,
    "losses": list,
    "skipped_steps": int,
}
OPTIMIZERS = ("optimizer", "selector_optimizer")
# options that later versions of torch added to optimizers; torch fills them in
LATER_OPTIONS = {
    "amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused",
    "initial_lr", "maximize", "nesterov", "param_names",
}  # fmt: skip


def check_complete(step: StepParts) -> None:
    """Refuse a state in the middle of a step.

    Raises:
        RuntimeError: batches wait for the rest of their step.
    """
    if step._waiting:
        hint = "save after the call that returns a result"
        got = f"{len(step._waiting)} of {step.accumulate} calls that make a step"
        fail(RuntimeError, "MTSStep.state_dict", "the step", "complete", got, hint)


def state_of(step: StepParts) -> dict[str, Any]:
    """All that a resumed run needs."""
    scheduler, scaler = step.selector_scheduler, step.scaler
    optimizers = {arg: getattr(step, arg).state_dict() for arg in OPTIMIZERS}
    return {
        "version": VERSION,
        "model": step._objective.model.state_dict(),
        **optimizers,
        "optimizer_class": type(step.optimizer).__name__,
        "parameters_with_state": {arg: _with_state(o) for arg, o in optimizers.items()},
        "selector": step._scorer.selector.state_dict(),
        "selector_optimizer_class": type(step.selector_optimizer).__name__,
        "selector_scheduler": None if scheduler is None else scheduler.state_dict(),
        "selector_scheduler_class": None if scheduler is None else type(scheduler).__name__,
        "online": step._features.state_dict(),
        "class_weight": step.class_weight,
        "engines": step._engines.state_dict(),
        "compute": step._compute.state_dict(),
        "losses": [module.state_dict() for module in _loss_modules(step)],
        "verdicts": digests_for(step.model.parameters()),
        "scaler": None if scaler is None else scaler.state_dict(),
        "steps": step.steps,
        "skipped_steps": step.skipped_steps,
    }


def load_state(step: StepParts, state: object) -> None:
    """Check a state, then load it; where loading fails, the old state is restored."""
    entries = copy.deepcopy(check_state(state, has_scheduler=step.selector_scheduler is not None))
    check_module_state("model", step._objective.model, entries["model"])
    check_module_state("selector", step._scorer.selector, entries["selector"])
    for arg in OPTIMIZERS:
        optimizer: torch.optim.Optimizer = getattr(step, arg)
        check_optimizer_state(arg, optimizer, entries[arg], entries.get(f"{arg}_class"))
        try:
            _check_all_read(arg, entries)
        except ValueError:
            if _has_live_tensors(step, state):
                step._torn = "parameters, by a checkpoint that was read in part,"
            raise
    saved_class = entries.get("selector_scheduler_class")
    _check_class("selector_scheduler", step.selector_scheduler, saved_class)
    if "losses" in entries:
        _check_losses(_loss_modules(step), entries["losses"])
    _compare_verdicts(step, entries.get("verdicts", []))
    old = copy.deepcopy(state_of(step))
    try:
        _write(step, entries)
    except BaseException:
        _write(step, old)
        raise
    step._torn = ""
    step._was_compared = False
    step._waiting.clear()
    step._gap = None


def _compare_verdicts(step: StepParts, saved: list[str]) -> None:
    """Say so where this process may run other kernels than the saved one."""
    here = digests_for(step.model.parameters())
    if saved != here:
        logger.warning(
            "the state was saved under verdicts %s, this process has %s: results may differ in the"
            " last digits; MTS_FAST_VERDICTS=PATH takes the same file",
            ", ".join(saved) or "none",
            ", ".join(here) or "none",
        )


def _write(step: StepParts, entries: dict[str, Any]) -> None:
    step._objective.model.load_state_dict(entries["model"])
    step.optimizer.load_state_dict(entries["optimizer"])
    step._scorer.selector.load_state_dict(entries["selector"])
    step.selector_optimizer.load_state_dict(entries["selector_optimizer"])
    if step.selector_scheduler is not None:
        step.selector_scheduler.load_state_dict(entries["selector_scheduler"])
    step._features.load_state_dict(entries["online"])
    for module, saved in zip(_loss_modules(step), entries.get("losses", []), strict=False):
        module.load_state_dict(saved)
    if "class_weight" in entries:
        step.class_weight = entries["class_weight"]
    step._engines.load_state_dict(entries.get("engines", {}))
    step._compute.load_state_dict(entries.get("compute", {}))
    if not entries.get("scaler"):  # saved without a scaler, or with a disabled one
        if step._owns_scaler:
            step.scaler, step._owns_scaler = None, False
    else:
        if step.scaler is None:  # the saved step had made its own under float16 autocast
            step.scaler = torch.amp.GradScaler(next(step.model.parameters()).device.type)
            step._owns_scaler = True
        assert step.scaler is not None
        step.scaler.load_state_dict(entries["scaler"])
    step.steps = entries["steps"]
    step.skipped_steps = entries.get("skipped_steps", 0)


def _loss_modules(step: StepParts) -> list[nn.Module]:
    """The modules among the losses, whose buffers a step moves."""
    roots = (*step._objective.world.roots[1:], *step._validation.world.roots[1:])
    return list(dict.fromkeys(roots))


def _check_class(arg: str, part: object, saved: object) -> None:
    """Require that a part is of the class whose name was saved; None: no name was saved."""
    if saved is not None and saved != type(part).__name__:
        hint = f"build {arg} as it was saved"
        fail(ValueError, OP, f"state[{arg!r}]", f"of {type(part).__name__}", saved, hint)


def _check_losses(losses: list[nn.Module], saved: list[Any]) -> None:
    if len(saved) != len(losses):
        hint = "build loss and val_loss as they were saved"
        expected = f"of {len(losses)} modules among the losses"
        fail(ValueError, OP, "state['losses']", expected, len(saved), hint)
    for i, (module, state) in enumerate(zip(losses, saved, strict=True)):
        check_module_state(f"losses[{i}]", module, state)


def check_state(state: object, *, has_scheduler: bool) -> dict[str, Any]:
    """The entries of a state, their types checked; a state of version 1 has fewer."""
    hint = "pass what MTSStep.state_dict() gave"
    if not isinstance(state, Mapping):
        fail(TypeError, OP, "state", "a mapping", describe(state), hint)
    version = state.get("version", 1)
    if version not in (1, VERSION):
        newer = "load it with the mts_fast that saved it, or a later one"
        fail(ValueError, OP, "state['version']", f"1 or {VERSION}", repr(version), newer)
    kinds: dict[str, Any] = {**REQUIRED, **(ADDED if version == VERSION else {})}
    for name, kind in kinds.items():
        if name not in state:
            present = ", ".join(map(str, state)) or "nothing"
            fail(ValueError, OP, "state", f"given the entry {name!r}", f"{present[:80]}", hint)
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            fail(TypeError, OP, f"state[{name!r}]", "as saved", describe(state[name]), hint)
    compute = state.get("compute", {})  # states from before sampled steps have none
    if not isinstance(compute, Mapping) or any(
        name not in STATE_TYPES or not isinstance(value, STATE_TYPES[name])
        for name, value in compute.items()
    ):
        fail(TypeError, OP, "state['compute']", "as saved", describe(compute), hint)
    verdicts = state.get("verdicts", [])  # states from before `mts-fast tune` have none
    if not isinstance(verdicts, list) or not all(isinstance(name, str) for name in verdicts):
        fail(TypeError, OP, "state['verdicts']", "as saved", describe(verdicts), hint)
    saved = state["selector_scheduler"] is not None
    if saved != has_scheduler:
        got = "one with a scheduler" if saved else "one without"
        expected = "of a step " + ("with a selector_scheduler" if has_scheduler else "without one")
        fail(ValueError, OP, "state", expected, got, "build MTSStep as it was saved")
    return dict(state)


def check_module_state(arg: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Check names and shapes of a module's state, as `load_state_dict` needs them."""
    current = module.state_dict()
    hint = "build the module as it was saved (unwrapped, if it was wrapped then)"
    missing = [n for n in current if n not in state]
    unexpected = [n for n in state if n not in current]
    if missing or unexpected:
        got = "; ".join(
            f"{kind} {', '.join(map(str, names[:3]))}"
            for kind, names in (("without", missing), ("with", unexpected))
            if names
        )
        fail(RuntimeError, OP, f"state[{arg!r}]", "of the same module", got, hint)
    for name, value in state.items():
        if isinstance(current[name], Tensor) and isinstance(value, Tensor):
            if current[name].shape != value.shape:
                expected = f"of shape {tuple(current[name].shape)}"
                fail(RuntimeError, OP, f"{arg} {name!r}", expected, tuple(value.shape), hint)
        elif type(current[name]) is not type(value):
            fail(TypeError, OP, f"{arg} {name!r}", describe(current[name]), describe(value), hint)


def check_optimizer_state(
    arg: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], name: object
) -> None:
    """Check class, groups and shapes of an optimizer's state; `name` is the saved class's."""
    current_groups = optimizer.state_dict()["param_groups"]
    hint = f"build {arg} as it was saved"
    _check_class(arg, optimizer, name)
    groups = state.get("param_groups")
    if not isinstance(groups, list) or not isinstance(state.get("state"), Mapping):
        fail(TypeError, OP, f"state[{arg!r}]", "of an optimizer", describe(state), hint)
    sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in current_groups]
    if sizes[0] != sizes[1]:
        expected = f"of groups of {sizes[1]} parameters"
        fail(ValueError, OP, f"state[{arg!r}]", expected, sizes[0], hint)
    for saved, present in zip(groups, current_groups, strict=True):
        options = [key for key in present if key not in saved and key not in LATER_OPTIONS]
        options += [key for key in ("betas", "momentum") if key in saved and key not in present]
        if options:
            got = "one with other options (" + ", ".join(options) + ")"
            expected = f"of {type(optimizer).__name__}"
            fail(ValueError, OP, f"state[{arg!r}]", expected, got, hint)
    if type(optimizer).__module__.startswith("torch.optim"):
        _check_complete(arg, state["state"], hint)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in groups for i in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                expected = f"of shape {tuple(parameter.shape)}"
                got = f"{key} of shape {tuple(value.shape)}"
                fail(ValueError, OP, f"state[{arg!r}] of parameter {index}", expected, got, hint)


def _with_state(optimizer: Mapping[str, Any]) -> int:
    """How many parameters have state, in an optimizer's `state_dict()`."""
    return sum(map(bool, optimizer["state"].values()))


def _check_all_read(arg: str, entries: Mapping[str, Any]) -> None:
    """Refuse a state that was read in part; older ones do not say how much they had."""
    saved, read = entries.get("parameters_with_state"), _with_state(entries[arg])
    if isinstance(saved, Mapping) and saved.get(arg, read) != read:
        hint = (
            "torch.distributed.checkpoint.load reads what a new step has already: pass planner="
            "mts_fast.distributed.checkpoint.StepLoadPlanner(state)"
        )
        expected = f"given the state of {saved[arg]} parameters, as it was saved"
        fail(ValueError, OP, f"state[{arg!r}]", expected, read, hint)


def _has_live_tensors(step: StepParts, state: Any) -> bool:
    """Whether a state's parameters are those of the model: what loads in place has written them."""
    parameters = {n: p.detach() for n, p in step._objective.model.named_parameters()}
    places = {n: _place_of(t) for n, t in state["model"].items() if n in parameters}
    return any(place == _place_of(parameters[n]) for n, place in places.items())


def _place_of(tensor: Any) -> int:
    local = tensor.to_local() if is_sharded(tensor) else tensor
    return int(local.data_ptr())


def _check_complete(arg: str, states: Mapping[Any, Any], hint: str) -> None:
    """Require the same entries for every parameter with state, as torch's optimizers keep."""
    entries = {key for state in states.values() for key in state}
    for index, state in states.items():
        missing = sorted(entries - {*state}) if state else []
        if missing:
            name = f"state[{arg!r}] of parameter {index}"
            fail(ValueError, OP, name, "complete", f"one without {', '.join(missing)}", hint)
