"""Update rules: what one step of an optimizer does to one tensor, and its derivative.

An `UpdateRule` is stateless and reads a parameter group and the live state of a parameter. A
`State` is a rule with the numbers and tensors of one parameter, as the reference and the kernels
take them. Nothing here writes to either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.reference.update_rules.noise import is_noise

if TYPE_CHECKING:
    from mts_fast.reference.update_rules.states import LiveStates

OP = "virtual_update"
Number = float | Tensor  # a tensor where reading it would wait for a device
Options = Mapping[str, Any]
# bounds of a number, as check_number takes them
Bounds = Mapping[str, float]
NOT_NEGATIVE: Bounds = {"at_least": 0.0}
SHARE: Bounds = {"at_least": 0.0, "below": 1.0}


class State(ABC):
    """An update rule with the hyper-parameters and live tensors of one parameter."""

    # whether the rule divides by the root of a second moment
    has_second_moment: bool = True
    # the state that it was made from by `live`, whose hyper-parameters it has; None: by itself
    base: State | None = None

    @property
    def origin(self) -> int:
        """Equal for states that were made from one, whose hyper-parameters they have."""
        return id(self.base or self)

    @abstractmethod
    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """theta' of the parameter's shape, differentiable in the gradient."""

    @abstractmethod
    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        along: Tensor,
        largest: Tensor,
        hypergradient_lr: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(kappa^T along, where kappa was taken for noise and set to 0; None: nowhere).

        `largest` [] is max |g| over all gradients of the call.
        """


class ElementwiseState(State):
    """A rule whose kappa is diagonal: every entry moves by its own gradient alone."""

    #: names of its tensors of the parameter's shape, each None before it exists
    tensors: ClassVar[tuple[str, ...]]
    #: names of its numbers that parameters of a group do not share
    counts: ClassVar[tuple[str, ...]] = ()
    lr: Number

    def live(self, **fields: Tensor | Number | None) -> Self:
        """This state with other tensors, or counts; cheaper than reading a group anew."""
        state = object.__new__(type(self))
        state.__dict__.update(self.__dict__, **fields, base=self)
        return state

    def scalar_kappa(self, lr: Number) -> Number | None:
        """kappa where it is one number for all entries, whatever the gradient; else None."""
        return None

    @abstractmethod
    def slope(
        self, parameter: Tensor, gradient: Tensor, lr: Number
    ) -> tuple[Tensor, Tensor | None]:
        """(-d theta'/d gradient, the root of the second moment), kappa not yet masked."""

    def kappa(
        self,
        parameter: Tensor,
        gradient: Tensor,
        largest: Tensor,
        hypergradient_lr: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(kappa, where it was set to 0)."""
        lr = self.lr if hypergradient_lr is None else hypergradient_lr
        kappa, root = self.slope(parameter, gradient, lr)
        if root is None:
            return kappa, None
        noise = is_noise(root, gradient, largest)
        return kappa.masked_fill(noise, 0.0), noise

    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        along: Tensor,
        largest: Tensor,
        hypergradient_lr: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        kappa, noise = self.kappa(parameter, gradient, largest, hypergradient_lr)
        return kappa * along, noise


class UpdateRule(ABC):
    """One step of an optimizer, tensor by tensor: subclass it for an optimizer of your own.

    `updated` is all that has to be written. It gets the parameter, its gradient, the parameter
    group (`group["lr"]`, ...) and the parameter's entry in `optimizer.state`, as they are before
    the step, and returns theta' as a new tensor by differentiable operations. It writes to nothing.

    The product kappa^T v = -(d theta'/d gradient)^T v comes from autograd through `updated`;
    override `direction` where a closed form is cheaper, or where terms cancel (Adam's do).
    Where the rule divides by the root of a second moment, override `second_moment_root`, so that
    entries whose gradient is rounding noise get kappa = 0.

    `hypergradient_lr` replaces `group["lr"]` in `direction` only.
    """

    #: options of a group that must be finite numbers (or tuples of them) within bounds, as
    #: `at_least`, `above`, `at_most`, `below`; checked in every call
    numbers: ClassVar[Mapping[str, Bounds]] = {"lr": NOT_NEGATIVE}
    #: names of single numbers, such as a count of steps, that a state which is not empty holds
    state_numbers: ClassVar[tuple[str, ...]] = ()
    #: names of state tensors of the parameter's shape that may be missing
    optional_state_tensors: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def updated(
        self, parameter: Tensor, gradient: Tensor, group: Options, state: Options
    ) -> Tensor:
        """theta' of the parameter's shape; `state` is empty before the first step."""

    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Options,
        state: Options,
        along: Tensor,
    ) -> Tensor:
        """kappa^T along, of the parameter's shape; by default by autograd through `updated`."""
        with torch.enable_grad():
            g = gradient.detach().requires_grad_()
            updated = self.updated(parameter.detach(), g, group, state)
            if not updated.requires_grad:
                got = "a tensor that autograd cannot follow to the gradient"
                hint = "use differentiable operations without no_grad, or override direction()"
                arg = f"{type(self).__name__}.updated()"
                fail(ValueError, OP, arg, "differentiable in the gradient", got, hint)
            (product,) = torch.autograd.grad(
                updated, g, along.to(updated.dtype), create_graph=along.requires_grad
            )
        return -product

    def second_moment_root(
        self, parameter: Tensor, gradient: Tensor, group: Options, state: Options
    ) -> Tensor | None:
        """sqrt(v_hat), from which the noise mask follows; None where the rule has none."""
        return None

    def reasons(self, group: Options, state: Options) -> list[str]:
        """Why this rule cannot serve a group or a parameter's state; empty where it can."""
        return []

    def state_tensors(self, group: Options) -> Iterable[str]:
        """Names of the state tensors of the parameter's shape that a step needs once the state of
        a parameter is not empty. Every call checks that they are there."""
        return ()

    def read(self, group: Options, state: Options) -> State:
        """The rule with the current options and state."""
        return RuleState(self, dict(group), dict(state))

    def read_all(self, group: Options, states: LiveStates) -> Sequence[State]:
        """The rule with the current options and the states of several parameters."""
        return [self.read(group, state) for state in states]


@dataclass(frozen=True)
class RuleState(State):
    """Any rule, with the options and live state of one parameter."""

    rule: UpdateRule
    group: Options
    state: Options

    @property
    def has_second_moment(self) -> bool:  # type: ignore[override]
        return type(self.rule).second_moment_root is not UpdateRule.second_moment_root

    def updated(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        versions = self._versions(parameter, gradient)
        updated = self.rule.updated(parameter, gradient, self.group, self.state)
        return self._checked("updated", updated, versions, parameter, gradient)

    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        along: Tensor,
        largest: Tensor,
        hypergradient_lr: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        lr = {} if hypergradient_lr is None else {"lr": hypergradient_lr}
        group = {**self.group, **lr}
        versions = self._versions(parameter, gradient, along)
        product = self.rule.direction(parameter, gradient, group, self.state, along)
        root = self.rule.second_moment_root(parameter, gradient, group, self.state)
        self._checked("direction", product, versions, parameter, gradient, along)
        if root is None:
            return product, None
        noise = is_noise(root, gradient, largest)
        # 0 * along and not 0: a NaN of the direction shows
        return torch.where(noise, 0.0 * along, product), noise

    def _versions(self, *tensors: Tensor) -> list[int]:
        """Counts of in-place writes to tensors that the rule may only read."""
        inputs = [*tensors, *(t for t in self.state.values() if isinstance(t, Tensor))]
        return [0 if t.is_inference() else t._version for t in inputs]

    def _checked(
        self, method: str, result: Tensor, versions: list[int], *tensors: Tensor
    ) -> Tensor:
        """The rule's result; raises where its shape is wrong or the rule wrote to its inputs."""
        arg = f"{type(self.rule).__name__}.{method}()"
        if self._versions(*tensors) != versions:
            hint = "use operations without a trailing underscore"
            fail(RuntimeError, OP, arg, "out of place", "a write to a tensor it reads", hint)
        shape = tensors[0].shape
        if not isinstance(result, Tensor) or result.shape != shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            fail(ValueError, OP, arg, f"a tensor of shape {tuple(shape)}", got, "correct the rule")
        return result


class ReadRule(UpdateRule):
    """A rule with a `State` class of its own, which kernels may support."""

    @abstractmethod
    def read(self, group: Options, state: Options) -> State: ...

    def updated(
        self, parameter: Tensor, gradient: Tensor, group: Options, state: Options
    ) -> Tensor:
        return self.read(group, state).updated(parameter, gradient)


def number(value: Any) -> Number:
    """A float; a 0-d tensor where reading it would wait for its device."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if value.device.type == "cpu" else value.detach().reshape(())


def effective_gradient(
    parameter: Tensor, gradient: Tensor, weight_decay: Number, maximize: bool
) -> Tensor:
    """The gradient that torch's optimizers use: sign turned under maximize, decay added."""
    g = -gradient if maximize else gradient
    return g + weight_decay * parameter if weight_decay else g
