"""The registry of update rules: those of torch's optimizers, and those that users add."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from mts_fast._check import describe, fail
from mts_fast.reference.update_rules import (
    AdamRule,
    MuonRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    SGDRule,
    UpdateRule,
)

_rules: dict[type[torch.optim.Optimizer], UpdateRule] = {
    torch.optim.SGD: SGDRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
    torch.optim.RMSprop: RMSpropRule(),
    torch.optim.NAdam: NAdamRule(),
    torch.optim.RAdam: RAdamRule(),
    torch.optim.Muon: MuonRule(),
}
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


def _unwrapped(step: Callable[..., Any]) -> Callable[..., Any]:
    """The function beneath the wrappers of an optimizer's step: torch's hooks (on the class),
    LRScheduler and torch.compile (on the object) wrap it by functools.wraps; accelerate puts the
    bound method itself back on the object."""
    beneath = inspect.unwrap(getattr(step, "__func__", step))
    return beneath if beneath is step else _unwrapped(beneath)


_OPTIMIZER = torch.optim.Optimizer
