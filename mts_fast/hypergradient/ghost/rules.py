"""Which functions the ghost engine can replay: functions that are linear in their parameters.

Of such a layer y = f(a; W), the output's tangent under a parameter tangent V is f(a; V): the layer
replayed with V in place of W. So a rule only has to say where the parameters stand among the
arguments, and, where there is a cheaper way than autograd, how to get the weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast import ops
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.ghost.source import Source

# (call, output cotangent b) -> gradient of each parameter that stands in the call, by name
WeightGradient = Callable[["LayerCall", Tensor], dict[str, Tensor]]
# (call, output cotangent b, where its samples lie, B) -> [B, *parameter] by name
SampleGradients = Callable[["LayerCall", Tensor, SampleAxis, int], dict[str, Tensor]]

# option name -> (position, its value in replays), or a function of the call that gives them
Options = Mapping[str, tuple[int, Any]]
ReplayOptions = Options | Callable[["LayerCall"], Options]


@dataclass(frozen=True)
class LayerRule:
    """How to replay one function; positions are those of its arguments."""

    function: Callable[..., Any]
    parameters: Mapping[str, int]  # name -> position
    input: int = 0
    nullable: Collection[str] = ("bias",)  # parameters that may be None
    weight_gradient: WeightGradient | None = None
    couples_samples: Callable[[LayerCall], str | None] = lambda call: None
    sample_gradients: SampleGradients | None = None
    # (call, tangents by name) -> the output's tangent, of a function that is not linear in them
    tangent: Callable[[LayerCall, Mapping[str, Tensor]], Tensor] | None = None
    # (call, replayed output) -> the output, where autograd drops or scales entries of the gradient
    adjusted: Callable[[LayerCall, Tensor], Tensor] | None = None
    refuses: Callable[[LayerCall], str | None] = lambda call: None
    # of options that write to tensors, or change nothing but the form of the gradient
    replay_options: ReplayOptions = field(default_factory=dict)


@dataclass
class LayerCall:
    """One call of a layer in a forward: its arguments and which of them stem from parameters."""

    rule: LayerRule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: dict[str, Source] = field(default_factory=dict)  # argument name -> its origin

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

    def option(self, name: str, position: int, default: Any) -> Any:
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
        """The same under the options of replays."""
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
    refuses: Callable[[LayerCall], str | None] | None = None,
    replay_options: ReplayOptions | None = None,
) -> None:
    """Teach the ghost engine a function that is linear in its parameters.

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
            name, for layers with few parameters; they replace the replay.
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
        couples_samples or (lambda call: None),
        sample_gradients,
        refuses=refuses or (lambda call: None),
        replay_options=replay_options or {},
    )


def rule_of(function: Callable[..., Any]) -> LayerRule | None:
    """The rule of a function, or None."""
    return _rules.get(function)


def _linear_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    """dW = b^T a and db = sum b, over all rows."""
    a, gradients = call.input.detach(), {}
    if call.argument("weight").ndim == 1:  # one output, without an axis of its own
        b = b.unsqueeze(-1)
    rows = b.reshape(-1, b.shape[-1])
    if "weight" in call.sources:
        dw = rows.T @ a.reshape(-1, a.shape[-1]).to(rows.dtype)
        gradients["weight"] = dw.view(call.argument("weight").shape)
    if "bias" in call.sources:
        gradients["bias"] = rows.sum(0).view(call.argument("bias").shape)
    return gradients


_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}


def convolution_options(call: LayerCall) -> dict[str, Any] | None:
    """What torch's convolution backward is called with.

    None for padding by name, and for an input without a batch axis.
    """
    function = call.rule.function
    transposed = function in _TRANSPOSED
    axes = (_TRANSPOSED if transposed else _CONVOLUTIONS)[function]
    # positions after (input, weight, bias) as torch declares them
    order = "stride padding dilation groups"
    if transposed:
        order = "stride padding output_padding groups dilation"
    option = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    option |= dict(zip(order.split(), call.args[3:], strict=False)) | call.kwargs
    if isinstance(option["padding"], str) or call.input.ndim != axes + 2:
        return None

    def per_axis(name: str) -> list[int]:
        value = option[name]
        return [value] * axes if isinstance(value, int) else list(value)

    lists = ("stride", "padding", "output_padding", "dilation")
    return {n: per_axis(n) for n in lists} | {"transposed": transposed, "groups": option["groups"]}


def _convolution_gradient(call: LayerCall, b: Tensor) -> dict[str, Tensor]:
    """torch's own convolution backward without its input gradient."""
    options = convolution_options(call)
    if options is None:
        plain = LayerRule(call.rule.function, call.rule.parameters)
        return LayerCall(plain, call.args, call.kwargs, call.sources).weight_gradients(b)
    wanted = [False, "weight" in call.sources, "bias" in call.sources]
    _, dw, db = torch.ops.aten.convolution_backward(
        b,
        call.input.detach().to(b.dtype),
        call.argument("weight").detach().to(b.dtype),
        [b.shape[1]],
        **options,
        output_mask=wanted,
    )
    return {n: g for n, g in {"weight": dw, "bias": db}.items() if n in call.sources}


def padding_row(call: LayerCall) -> int | None:
    """The row of an embedding's table that gets no gradient."""
    index = call.option("padding_idx", 2, None)
    return None if index is None else index % len(call.argument("weight"))


def scaled_by_frequency(call: LayerCall) -> bool:
    """Whether autograd divides an embedding's gradient by how often its index is in the batch."""
    return bool(call.option("scale_grad_by_freq", 5, False))


def _as_autograd_has_it(call: LayerCall, y: Tensor) -> Tensor:
    """Without rows of the padding index, which get no gradient; over the frequency if it counts."""
    padding, index = padding_row(call), call.input
    if padding is not None:
        y = y.masked_fill((index == padding)[..., None], 0)
    if scaled_by_frequency(call):
        times = torch.bincount(index.flatten(), minlength=len(call.argument("weight")))
        y = y / times[index][..., None].to(y.dtype)
    return y


def _bag_is_not_linear(call: LayerCall) -> str | None:
    if call.option("mode", 6, "mean") == "max":
        return "EmbeddingBag with mode='max' is not linear in its table"
    if call.option("scale_grad_by_freq", 5, False):
        return "EmbeddingBag with scale_grad_by_freq=True has a gradient of its own"
    return None


register_layer(F.linear, {"weight": 1, "bias": 2}, weight_gradient=_linear_gradient)
_convolutions: list[Callable[..., Any]] = [*_CONVOLUTIONS, *_TRANSPOSED]
for _function in _convolutions:
    register_layer(_function, {"weight": 1, "bias": 2}, weight_gradient=_convolution_gradient)
for _function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
    register_layer(_function, {"weight": 1})
register_layer(torch.einsum, {"weight": 2}, input=1)
register_layer(torch.addmm, {"bias": 0, "weight": 2}, input=1, nullable=())
# autograd gives the row of the padding index no gradient here, though a tied head may; the forward
# has already renormalised the table with max_norm
_rules[F.embedding] = LayerRule(
    F.embedding,
    {"weight": 1},
    adjusted=_as_autograd_has_it,
    replay_options={
        "max_norm": (3, None),
        "scale_grad_by_freq": (5, False),
        "sparse": (6, False),
    },
)
register_layer(
    F.embedding_bag,
    {"weight": 1},
    nullable=(),
    refuses=_bag_is_not_linear,
    replay_options={"max_norm": (3, None), "sparse": (7, False)},
)


def _losses_tangent(call: LayerCall, tangents: Mapping[str, Tensor]) -> Tensor:
    return ops.linear_cross_entropy_tangent(
        *call.args,
        **call.kwargs,
        weight_tangent=tangents.get("weight"),
        bias_tangent=tangents.get("bias"),
    )


# a last layer whose output is the losses
_rules[ops.linear_cross_entropy] = LayerRule(
    ops.linear_cross_entropy, {"weight": 1, "bias": 3}, tangent=_losses_tangent
)
