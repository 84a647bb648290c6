"""What the ghost engine has to know of a function that is linear in its parameters, and the
functions that it knows (`layers/` has torch's).

For a layer y = f(a; W) of this kind, the output's tangent under a parameter tangent V is f(a; V):
the layer replayed with V in place of W. So a rule only has to say where the parameters stand among
the arguments; its other fields are cheaper ways than autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mts_fast.hypergradient.ghost.parts import GradientPart
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.source import ParameterSource

# (call, output cotangent b) -> gradient of each parameter that stands in the call, by name
WeightGradient = Callable[["LayerCall", Tensor], dict[str, Tensor]]
# (call, output cotangent b, where its samples lie, B) -> [B, *parameter] by name
SampleGradients = Callable[["LayerCall", Tensor, SampleAxis, int], dict[str, Tensor]]
# the same arguments -> each sample's gradient in a form whose norm is cheap, by name; a reason why
# it cannot be had; or None: one sample after the other
SampleParts = Callable[
    ["LayerCall", Tensor, SampleAxis, int], "Mapping[str, GradientPart] | str | None"
]
# (a [B, T, K], v [N, K], b [B, T, N], direction of the bias [N]) of a replay that is a product
Product = tuple[Tensor, Tensor, Tensor, "Tensor | None"]
# (call, directions by name, b, where its samples lie, B) -> the product, or None where it is none
AsProduct = Callable[["LayerCall", Mapping[str, Tensor], Tensor, SampleAxis, int], "Product | None"]

# (call, directions by name) -> the output's tangent
Tangent = Callable[["LayerCall", Mapping[str, Tensor]], Tensor]

# option name -> (position, its value in replays), or a function of the call that gives them
Options = Mapping[str, tuple[int, Any]]
ReplayOptions = Options | Callable[["LayerCall"], Options]


def _no_reason(call: LayerCall) -> None:
    return None


@dataclass(frozen=True)
class LayerRule:
    """How to treat calls of one function; the fields are the arguments of `register_layer`."""

    function: Callable[..., Any]
    parameters: Mapping[str, int]  # name -> position
    input: int = 0
    nullable: Collection[str] = ("bias",)
    weight_gradient: WeightGradient | None = None
    couples_samples: Callable[[LayerCall], str | None] = _no_reason
    sample_gradients: SampleGradients | None = None
    sample_parts: SampleParts | None = None
    as_product: AsProduct | None = None
    tangent: Tangent | None = None
    adjusted: Callable[[LayerCall, Tensor], Tensor] | None = None
    refuses: Callable[[LayerCall], str | None] = _no_reason
    replay_options: ReplayOptions = field(default_factory=dict)
    adjusts: Callable[[LayerCall], bool] | None = None
    # not of `register_layer`: where the samples may be for `sample_gradients`, given the number of
    # axes of the output; whether replays need the input. Where they do not (x + W), a tangent may
    # be the direction itself, which is the caller's
    few: Callable[[LayerCall, SampleAxis, int], bool] | None = None
    reads_input: bool = True


@dataclass
class LayerCall:
    """One call of a layer in a forward: its arguments and which of them stem from parameters."""

    rule: LayerRule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: dict[str, ParameterSource] = field(default_factory=dict)  # argument name -> its origin

    @property
    def input(self) -> Tensor:
        """The layer's input."""
        position = self.rule.input
        return self.args[position] if position < len(self.args) else self.kwargs["input"]

    def argument(self, name: str, default: Any = None) -> Any:
        """A parameter of the rule as it was passed."""
        position = self.rule.parameters[name]
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """Another argument as it was passed."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def unsupported(self) -> str | None:
        """Why the rule does not hold for this call, or None."""
        tensors = {"input": self.input} | {name: self.argument(name) for name in self.sources}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and (
                tensor.layout is not torch.strided or tensor.is_nested
            ):
                return f"the {name} of its {self.rule.function.__name__} is not a dense tensor"
        return self.rule.refuses(self)

    def run(self, replaced: Mapping[str, Tensor | None]) -> Tensor:
        """The function with other tensors in place of its parameters."""
        positions = self.rule.parameters
        return self._with({name: (positions[name], value) for name, value in replaced.items()})

    def replay_with(self, replaced: Mapping[str, Tensor | None]) -> Tensor:
        """`run` under the options of replays."""
        options, positions = self.rule.replay_options, self.rule.parameters
        fixed = options(self) if callable(options) else options
        parameters = {name: (positions[name], value) for name, value in replaced.items()}
        return self._with({**fixed, **parameters})

    def _with(self, replaced: Mapping[str, tuple[int, Any]]) -> Tensor:
        """The function with other arguments, name -> (position, value)."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, (position, value) in replaced.items():
            if position < len(args):
                args[position] = value
            elif value is not None or name in kwargs:
                kwargs[name] = value
        return self.rule.function(*args, **kwargs)

    def replay(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """f(a; V): the output's tangent; parameters without a tangent count as zero."""
        if self.rule.tangent is not None:
            return self.rule.tangent(self, tangents)
        replaced: dict[str, Tensor | None] = {}
        for name in self.rule.parameters:
            present = self.argument(name)
            if name in tangents:
                replaced[name] = tangents[name]
            elif isinstance(present, Tensor):
                absent = name in self.rule.nullable
                replaced[name] = None if absent else torch.zeros_like(present)
        y = self.replay_with(replaced)
        return y if self.rule.adjusted is None else self.rule.adjusted(self, y)

    def weight_gradients(self, b: Tensor) -> dict[str, Tensor]:
        """Gradient of each argument that stems from a parameter, for the output cotangent b."""
        if self.rule.weight_gradient is not None:
            return self.rule.weight_gradient(self, b)
        with torch.enable_grad():
            leaves = {n: self.argument(n).detach().requires_grad_() for n in self.sources}
            y = self.replay(leaves) if self.rule.tangent is None else self.run(leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), b.to(y.dtype))
        return dict(zip(leaves, gradients, strict=True))


_rules: dict[Callable[..., Any], LayerRule] = {}


def register_layer(
    function: Callable[..., Any],
    parameters: Mapping[str, int],
    *,
    input: int = 0,
    nullable: Collection[str] = ("bias",),
    weight_gradient: WeightGradient | None = None,
    couples_samples: Callable[[LayerCall], str | None] | None = None,
    sample_gradients: SampleGradients | None = None,
    sample_parts: SampleParts | None = None,
    as_product: AsProduct | None = None,
    tangent: Tangent | None = None,
    adjusted: Callable[[LayerCall, Tensor], Tensor] | None = None,
    refuses: Callable[[LayerCall], str | None] | None = None,
    replay_options: ReplayOptions | None = None,
    adjusts: Callable[[LayerCall], bool] | None = None,
) -> None:
    """Register a function that is linear in its parameters with the ghost engine.

    torch's own layers are registered by this function, too: yours can have all that they have.

    Args:
        function: as the model calls it: a torch function, or your own Python function on tensors
            that hands itself to `torch.overrides.handle_torch_function` under a mode. It returns a
            tensor of its own, not a view of a parameter.
        parameters: name -> position of each parameter tensor; they may also be passed by name.
        input: position of the layer's input, which may also be passed as `input=`.
        nullable: parameters in whose place the function takes None for zero.
        weight_gradient: (call, b) -> gradients by name; by autograd where left out.
        couples_samples: (call) -> why this call mixes samples, or None.
        sample_gradients: (call, b, axis, B) -> every sample's own gradients [B, *parameter] by
            name, for layers with few parameters; they replace the replay. b is the gradient at the
            output; `axis.samples(b, B)` is [B, r, ...], with the samples first.
        sample_parts: (call, b, axis, B) -> for gradient norms each sample's gradients by name, as
            `OuterPart`, `ScatteredPart` or `DensePart`; or a reason why they cannot be had; or None
            for one sample after the other, as where it is left out.
        as_product: (call, directions by name, b, axis, B) -> (a [B, T, K], v [N, K], b [B, T, N],
            direction of the bias [N] or None) where the replay is the product a v^T + bias, so that
            a kernel may fuse it with the dot product; or None.
        tangent: (call, directions by name) -> the output's tangent, of a function that is not
            linear in its parameters but whose tangent is known.
        adjusted: (call, replayed output) -> the output, where autograd drops or scales entries of
            the gradient.
        adjusts: (call) -> whether it scales them in a way that torch does not differentiate again.
        refuses: (call) -> why the function is not linear in its parameters with the options of this
            call (`call.option(name, position, default)`), or None.
        replay_options: option name -> (position, value that replays use), or a function of the call
            that gives them: needed for options under which the function writes to its parameters
            (a replay passes the caller's direction in their place) or to a buffer.

    Example:
        >>> import torch
        >>> from mts_fast.hypergradient import register_layer
        >>> register_layer(torch.nn.functional.bilinear, {"weight": 2, "bias": 3})
    """
    _rules[function] = LayerRule(
        function,
        parameters,
        input,
        nullable,
        weight_gradient,
        couples_samples or _no_reason,
        sample_gradients,
        sample_parts,
        as_product,
        tangent,
        adjusted,
        refuses or _no_reason,
        replay_options or {},
        adjusts,
    )


def rule_of(function: Callable[..., Any]) -> LayerRule | None:
    """The rule of a function, or None."""
    return _rules.get(function)
