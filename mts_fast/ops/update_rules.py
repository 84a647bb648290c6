"""The registry of update rules, those of torch's optimizers and those that users add; which
optimizers they serve."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import check_number, describe, fail
from mts_fast._columns import Column, are_tensors, devices_of, shapes_of, sizes_of
from mts_fast.reference.update_rules import (
    AdamRule,
    MuonRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    SGDRule,
    UpdateRule,
)
from mts_fast.reference.update_rules.rule import NOT_NEGATIVE, Bounds
from mts_fast.reference.update_rules.states import LiveStates

_rules: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: SGDRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
    torch.optim.RMSprop: RMSpropRule(),
    torch.optim.NAdam: NAdamRule(),
    torch.optim.RAdam: RAdamRule(),
    torch.optim.Muon: MuonRule(),
}
# device types on which torch refuses a step with capturable=True
NOT_CAPTURABLE = ("cpu", "mps", "meta")
# hint where a state does not fit
RELOAD = "load the state that this optimizer saved for this model, or clear optimizer.state"
# hints for optimizers that no rule can serve
HINTS = {
    torch.optim.LBFGS: "it evaluates the model several times in a step; take SGD or AdamW",
    torch.optim.SparseAdam: "make the embedding with sparse=False and take Adam",
}


def register_update_rule(
    optimizer_class: type[torch.optim.Optimizer],
    rule: UpdateRule | type[torch.optim.Optimizer],
) -> None:
    """Say what one step of an optimizer class does, so that MTS can look one step ahead.

    Args:
        optimizer_class: the class of your optimizer. Its subclasses are served, too, unless they
            override `step`.
        rule: an `UpdateRule` object with an `updated` method; or another class, such as
            torch.optim.AdamW, whose rule is to serve this one: for a subclass that overrides
            `step` and leaves what it computes alone.

    Raises:
        TypeError: arguments of other types.
        ValueError: a class, given as `rule`, that has no rule.

    Notes:
        A rule takes the place of one that was there before. SGD, Adam, AdamW, RMSprop, NAdam, RAdam
        and Muon of torch.optim are there from the start; register `LionRule` for your Lion class.
        Rules without a Triton or C++ kernel (all but SGD, Adam and AdamW without amsgrad) run on
        the reference under every backend.

    Source: row 4 of the algorithm; a rule says what U is.

    Example:
        >>> import torch, mts_fast
        >>> class NormalizedSGD(torch.optim.SGD):
        ...     def step(self, closure=None): ...
        >>> class NormalizedRule(mts_fast.UpdateRule):
        ...     def updated(self, parameter, gradient, group, state):
        ...         return parameter - group["lr"] * gradient / gradient.norm()
        >>> mts_fast.register_update_rule(NormalizedSGD, NormalizedRule())
        >>> optimizer = NormalizedSGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
        >>> update = mts_fast.virtual_update(optimizer, [torch.tensor([3.0, 4.0])])
        >>> update.parameters[0].tolist()
        [0.699999988079071, 0.6000000238418579]
    """
    op = "register_update_rule"
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, _OPTIMIZER)):
        expected = "a subclass of torch.optim.Optimizer"
        hint = "pass the class of the optimizer, not an instance"
        fail(TypeError, op, "optimizer_class", expected, describe(optimizer_class), hint)
    if isinstance(rule, type) and issubclass(rule, _OPTIMIZER):
        same = _rules.get(rule)
        if same is None:
            hint = f"give one of {rule_names()}, or an UpdateRule"
            fail(ValueError, op, "rule", "a class that has a rule", rule.__name__, hint)
        rule = same
    if not isinstance(rule, UpdateRule):
        hint = "subclass mts_fast.UpdateRule and pass an object of it"
        fail(TypeError, op, "rule", "an UpdateRule", describe(rule), hint)
    _rules[optimizer_class] = rule


def rule_of(op: str, arg: str, optimizer: object) -> UpdateRule:
    """The rule that serves an optimizer; raises where no rule describes its step."""
    if not isinstance(optimizer, _OPTIMIZER):
        hint = "pass the torch.optim.Optimizer object itself"
        fail(TypeError, op, arg, f"an optimizer ({rule_names()})", describe(optimizer), hint)
    name = type(optimizer).__name__
    cls = next((c for c in type(optimizer).__mro__ if c in _rules), None)
    if cls is None:
        hint = next((text for c, text in HINTS.items() if isinstance(optimizer, c)), "")
        hint = hint or (
            "if it wraps one of these, pass the wrapped optimizer, else say what it computes with"
            " mts_fast.register_update_rule"
        )
        fail(TypeError, op, arg, rule_names(), name, hint)
    # torch wraps `step` of the first class of a family that is instantiated, subclass or not
    step = _unwrapped(cls.step)
    if _unwrapped(type(optimizer).step) is not step:
        hint = f"mts_fast.register_update_rule({name}, ...) says what it computes"
        fail(TypeError, op, arg, rule_names(), f"{name}, which overrides step()", hint)
    replaced = vars(optimizer).get("step")
    if replaced is not None and _unwrapped(replaced) is not step:
        hint = "subclass the optimizer and register the subclass with mts_fast.register_update_rule"
        got = f"{name} with a step() replaced on the object"
        fail(TypeError, op, arg, "an optimizer that steps as its class does", got, hint)
    return _rules[cls]


def rule_names() -> str:
    """Names of the classes that are served."""
    return ", ".join(dict.fromkeys(cls.__name__ for cls in _rules))


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer would step, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


@dataclass(frozen=True)
class LiveGroup:
    """The trainable parameters of a group, and their entries in `optimizer.state`, empty before
    the first step."""

    options: dict[str, Any]
    parameters: Column
    states: LiveStates


def live_groups(optimizer: torch.optim.Optimizer) -> list[LiveGroup]:
    """What an optimizer has at this moment."""
    groups = []
    none: dict[str, Any] = {}
    for group in optimizer.param_groups:
        parameters = Column([p for p in group["params"] if p.requires_grad])
        states = LiveStates([state or none for state in map(optimizer.state.get, parameters)])
        groups.append(LiveGroup(group, parameters, states))
    return groups


def check_optimizer(
    optimizer: torch.optim.Optimizer, *, op: str = "virtual_update", arg: str = "optimizer"
) -> UpdateRule:
    """The rule that serves an optimizer; raises with the reason and the remedy where none does.

    Checks the class, a step that replaces the class's, the options of every group, and names and
    shapes in the state. Tensors are read on the CPU alone. Messages name the optimizer by `op` and
    `arg`.
    """
    return checked_groups(optimizer, op, arg)[0]


def checked_groups(
    optimizer: torch.optim.Optimizer, op: str, arg: str
) -> tuple[UpdateRule, list[LiveGroup]]:
    """The rule, and the groups that were checked; see `check_optimizer`."""
    rule = rule_of(op, arg, optimizer)
    groups = live_groups(optimizer)
    for i, group in enumerate(groups):
        where = f"{arg}.param_groups[{i}]"
        if group.options.get("differentiable"):
            hint = "make it with differentiable=False; MTS differentiates the step by itself"
            fail(ValueError, op, where, "without differentiable", "differentiable=True", hint)
        if group.options.get("capturable"):
            devices = {device.type for device in devices_of(group.parameters)}
            if devices.intersection(NOT_CAPTURABLE):
                hint = "make it with capturable=False, or move the model to the GPU first"
                got = f"capturable=True on {', '.join(sorted(devices))}"
                fail(ValueError, op, where, "without capturable off a GPU", got, hint)
        _check_numbers(op, where, group.options, rule.numbers)
    if not any(len(group.parameters) for group in groups):
        hint = "set requires_grad on the parameters that shall learn"
        fail(ValueError, op, arg, "given trainable parameters", "none", hint)
    for group in groups:
        _check_states(op, arg, rule, group)
    return rule, groups


def _check_states(op: str, arg: str, rule: UpdateRule, group: LiveGroup) -> None:
    """Names, shapes and numbers in the states of a group, and the rule's own reasons."""
    names = tuple(rule.state_tensors(group.options))
    present = all(
        _all_present(group.states.column(name), group.parameters)
        for name in (*names, *rule.optional_state_tensors)
    )
    numbers = all(_are_counts(group.states, name) for name in rule.state_numbers)
    explains = type(rule).reasons is not UpdateRule.reasons
    if present and numbers and not explains:
        return
    for parameter, state in zip(group.parameters, group.states, strict=True):
        if not present:
            _check_state_tensors(op, arg, parameter, state, rule, names if state else ())
        for name in rule.state_numbers if state and not numbers else ():
            _check_number(op, f"{arg}.state[...][{name!r}]", state.get(name), NOT_NEGATIVE, RELOAD)
        reasons = rule.reasons(group.options, state)
        if reasons:
            hint = "change these options, or take another optimizer"
            expected = "one that can be looked ahead of"
            fail(ValueError, op, arg, expected, "; ".join(reasons), hint)


def _check_numbers(
    op: str, where: str, group: Mapping[str, Any], numbers: Mapping[str, Bounds]
) -> None:
    """Options that the rule computes with: finite and within bounds; see `_check_number`."""
    for name, bounds in numbers.items():
        hint = f"set group[{name!r}] to a number"
        arg = f"{where}[{name!r}]"
        if name not in group:
            hint = "load a state_dict of this optimizer class"
            fail(ValueError, op, where, f"a group with {name!r}", "one without", hint)
        value = group[name]
        for entry in value if isinstance(value, list | tuple) else (value,):
            _check_number(op, arg, entry, bounds, hint)


def _check_number(op: str, arg: str, value: object, bounds: Bounds, hint: str) -> None:
    """A number within bounds, or a tensor of one element; off the CPU it is not read."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            fail(ValueError, op, arg, "a tensor of one element", describe(value), hint)
        if value.device.type != "cpu":
            return
        value = value.item()
    check_number(op, arg, value, **bounds, hint=hint)


def _all_present(tensors: list[Any], parameters: Sequence[Tensor]) -> bool:
    """Whether each parameter has a tensor of its shape on its device; asked without a loop."""
    return (
        are_tensors(tensors)
        and shapes_of(tensors) == shapes_of(parameters)
        and len(devices_of(tensors) | devices_of(parameters)) <= 1
    )


def _are_counts(states: LiveStates, name: str) -> bool:
    """Whether the numbers of that name are finite and at least 0, as counts of steps are; asked
    without a loop, and of none that is on a device."""
    entries = states.column(name)
    if not are_tensors(entries) or sizes_of(entries) != [1] * len(entries):
        return False
    if any(device.type != "cpu" for device in devices_of(entries)):
        return False
    values = states.numbers(name)
    return all(type(value) is float and 0 <= value < math.inf for value in values)


def _check_state_tensors(
    op: str,
    arg: str,
    parameter: Tensor,
    state: Mapping[str, Any],
    rule: UpdateRule,
    needed: tuple[str, ...],
) -> None:
    """The tensors that the step needs, of the parameter's shape and on its device."""
    shape = parameter.shape
    for name in (*needed, *rule.optional_state_tensors):
        tensor = state.get(name)
        if not isinstance(tensor, Tensor):
            if name in needed or tensor is not None:
                got = f"{describe(tensor)} for the parameter of shape {tuple(shape)}"
                fail(ValueError, op, f"{arg}.state[...][{name!r}]", "a tensor", got, RELOAD)
        elif tensor.shape != shape or tensor.device != parameter.device:
            expected = f"of shape {tuple(shape)} on {parameter.device} like its parameter"
            got = f"{describe(tensor)} on {tensor.device}"
            fail(ValueError, op, f"{arg}.state[...][{name!r}]", expected, got, RELOAD)


def _unwrapped(step: Callable[..., Any]) -> Callable[..., Any]:
    """The function beneath the wrappers of an optimizer's step: torch's hooks (on the class),
    LRScheduler and torch.compile (on the object) wrap it by functools.wraps; accelerate puts the
    bound method itself back on the object."""
    beneath = inspect.unwrap(getattr(step, "__func__", step))
    return beneath if beneath is step else _unwrapped(beneath)


_OPTIMIZER = torch.optim.Optimizer
