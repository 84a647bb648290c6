"""Checks of an optimizer and its gradients for a virtual update, made in every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import (
    check_device,
    check_floating,
    check_number,
    describe,
    fail,
)
from mts_fast.ops.update_rules import rule_of
from mts_fast.reference.update_rules import UpdateRule
from mts_fast.reference.update_rules.rule import NOT_NEGATIVE, Bounds

OP = "virtual_update"
# device types on which torch refuses a step with capturable=True
NOT_CAPTURABLE = ("cpu", "mps", "meta")


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the optimizer would step, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def check_optimizer(
    optimizer: torch.optim.Optimizer, *, op: str = OP, arg: str = "optimizer"
) -> UpdateRule:
    """The rule that serves an optimizer; raises with the reason and the remedy where none does.

    Checks the class, a step that replaces the class's, the options of every group, and names and
    shapes in the state. Tensors are read on the CPU alone. Messages name the optimizer by `op` and
    `arg`.
    """
    rule = rule_of(op, arg, optimizer)
    for i, group in enumerate(optimizer.param_groups):
        where = f"{arg}.param_groups[{i}]"
        if group.get("differentiable"):
            hint = "make it with differentiable=False; MTS differentiates the step by itself"
            fail(ValueError, op, where, "without differentiable", "differentiable=True", hint)
        devices = {p.device.type for p in group["params"] if p.requires_grad}
        if group.get("capturable") and devices.intersection(NOT_CAPTURABLE):
            hint = "make it with capturable=False, or move the model to the GPU first"
            got = f"capturable=True on {', '.join(sorted(devices))}"
            fail(ValueError, op, where, "without capturable off a GPU", got, hint)
        _check_numbers(op, where, group, rule.numbers)
    parameters = trainable_parameters(optimizer)
    if not parameters:
        hint = "set requires_grad on the parameters that shall learn"
        fail(ValueError, op, arg, "given trainable parameters", "none", hint)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                state = optimizer.state.get(parameter, {})
                _check_state(op, arg, parameter, group, state, rule)
    return rule


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


def _check_state(
    op: str,
    arg: str,
    parameter: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    rule: UpdateRule,
) -> None:
    """The tensors that the step needs, of the parameter's shape; then the rule's own reasons."""
    hint = "load the state that this optimizer saved for this model, or clear optimizer.state"
    shape = tuple(parameter.shape)
    needed = tuple(rule.state_tensors(group)) if state else ()
    for name in (*needed, *rule.optional_state_tensors):
        tensor = state.get(name)
        if not isinstance(tensor, Tensor):
            if name in needed or tensor is not None:
                got = f"{describe(tensor)} for the parameter of shape {shape}"
                fail(ValueError, op, f"{arg}.state[...][{name!r}]", "a tensor", got, hint)
        elif tensor.shape != parameter.shape or tensor.device != parameter.device:
            expected = f"of shape {shape} on {parameter.device} like its parameter"
            got = f"{describe(tensor)} on {tensor.device}"
            fail(ValueError, op, f"{arg}.state[...][{name!r}]", expected, got, hint)
    for name in rule.state_numbers if state else ():
        _check_number(op, f"{arg}.state[...][{name!r}]", state.get(name), NOT_NEGATIVE, hint)
    reasons = rule.reasons(group, state)
    if reasons:
        hint = "change these options, or take another optimizer"
        fail(ValueError, op, arg, "one that can be looked ahead of", "; ".join(reasons), hint)


def check_like(arg: str, tensors: object, parameters: Sequence[Tensor]) -> None:
    """One per parameter, of its shape and on its device, dense and floating-point, or None."""
    expected = f"one per trainable parameter ({len(parameters)})"
    hint = "give a list in the order of the optimizer's groups, with None where there is none"
    if not isinstance(tensors, list | tuple):
        fail(TypeError, OP, arg, f"a list, {expected}", describe(tensors), hint)
    if len(tensors) != len(parameters):
        fail(ValueError, OP, arg, expected, len(tensors), hint)
    for i, (parameter, tensor) in enumerate(zip(parameters, tensors, strict=True)):
        if tensor is None:
            continue
        check_floating(OP, f"{arg}[{i}]", tensor)
        if tensor.shape != parameter.shape:
            expected = f"of shape {tuple(parameter.shape)}"
            hint = f"parameter {i} of mts_fast.ops.trainable_parameters(optimizer) has that shape"
            fail(ValueError, OP, f"{arg}[{i}]", expected, tuple(tensor.shape), hint)
        check_device(OP, f"{arg}[{i}]", tensor, parameter.device, f"parameter {i}")
