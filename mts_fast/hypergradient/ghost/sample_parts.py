"""A call's part of every sample's gradient, in whichever form is cheapest to take the norm of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast import ops
from mts_fast.hypergradient.ghost.recorded import Recorded, Unsupported
from mts_fast.hypergradient.ghost.rules import (
    LayerCall,
    convolution_options,
    padding_row,
    scaled_by_frequency,
)
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


class Part(ABC):
    """Gradients of B samples by one argument of one call."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared Euclidean norms [B]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[B, entries of the argument]."""


@dataclass
class Dense(Part):
    """The gradients themselves."""

    values: Tensor  # [B, n]

    def squares(self) -> Tensor:
        return torch.linalg.vecdot(self.values, self.values)

    def dense(self) -> Tensor:
        return self.values


@dataclass
class Outer(Part):
    """sum_t left_t right_t^T, as of a linear layer at T positions."""

    left: Tensor  # [B, T, R]
    right: Tensor  # [B, T, C]

    def squares(self) -> Tensor:
        _, positions, rows = self.left.shape
        columns = self.right.shape[2]
        if positions == 1:
            left, right = self.left[:, 0], self.right[:, 0]
            return torch.linalg.vecdot(left, left) * torch.linalg.vecdot(right, right)
        # multiplications a sample: T^2 (R + C) by Gram matrices, T R C for the gradient itself
        if positions * (rows + columns) < rows * columns:
            return inner(self, self)
        return Dense(self.dense()).squares()

    def dense(self) -> Tensor:
        return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)


@dataclass
class Rows(Part):
    """Row index_t receives right_t, as of an embedding."""

    index: Tensor  # [B, T]
    right: Tensor  # [B, T, C]
    count: int  # rows of the table

    def squares(self) -> Tensor:
        return inner(self, self)

    def dense(self) -> Tensor:
        table = self.right.new_zeros(len(self.index), self.count, self.right.shape[2])
        at = self.index[..., None].expand_as(self.right)
        return table.scatter_add_(1, at, self.right).flatten(1)


def inner(x: Part, y: Part) -> Tensor:
    """<x_i, y_i> [B] of two parts of one parameter."""
    if isinstance(x, Outer) and isinstance(y, Outer):
        left = torch.bmm(x.left, y.left.transpose(1, 2))  # [B, T, S]
        return (left * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    if isinstance(x, Rows) and isinstance(y, Rows):
        same = x.index[:, :, None] == y.index[:, None, :]
        return (same * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    if isinstance(x, Outer) and isinstance(y, Rows):
        x, y = y, x
    if isinstance(x, Rows) and isinstance(y, Outer):
        at = x.index[:, None, :].expand(-1, y.left.shape[1], -1)
        left = y.left.gather(2, at).transpose(1, 2)  # [B, T, S]
        return (left * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    return torch.linalg.vecdot(x.dense(), y.dense())


def sample_parts(use: Recorded, axis: SampleAxis, b: Tensor, size: int) -> dict[str, Part]:
    """The parts of one use by argument name, for the output cotangent b of sum_i l_i."""
    call = use.call
    if call is None:
        return {"value": Dense(b.reshape(size, -1))}
    function = call.rule.function
    if call.rule.sample_gradients is not None:
        by_name = call.rule.sample_gradients(call, b, axis, size)
        return {name: Dense(g.flatten(1)) for name, g in by_name.items()}
    if function is F.linear and call.argument("weight").ndim == 2:
        left, right = _positions(b, axis, size), _positions(call.input, axis, size)
        return _named(call, Outer(left, right), left)
    if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.addmm):
        weight = call.argument("weight")
        bias = call.argument("bias") if "bias" in call.sources else None
        if weight.ndim == 2 and (bias is None or bias.ndim == 1):
            left, right = _positions(b, axis, size), _positions(call.input, axis, size)
            return _named(call, Outer(right, left), left)
    if function is F.embedding and axis == SampleAxis() and not scaled_by_frequency(call):
        return {"weight": _embedding(call, b, size)}
    options = convolution_options(call) if "conv" in function.__name__ else None
    if options is not None and axis == SampleAxis() and len(b) == size:
        return _convolution(call, b, options)
    if function is ops.linear_cross_entropy:
        raise Unsupported([f"{use.path}: linear_cross_entropy has no logits to look at"])
    if axis != SampleAxis() or len(b) != size or len(call.input) != size:
        raise Unsupported([f"{use.path}: {function.__name__} with its batch elsewhere"])
    return _one_by_one(call, b, size)


def _named(call: LayerCall, weight: Part, b: Tensor) -> dict[str, Part]:
    """The parts that are asked for; b [B, T, R] sums to the bias's."""
    parts: dict[str, Part] = {"weight": weight, "bias": Dense(b.sum(1))}
    return {name: part for name, part in parts.items() if name in call.sources}


def _positions(values: Tensor, axis: SampleAxis, size: int) -> Tensor:
    """[B, T, D] of a layer's input or output gradient."""
    rows = axis.samples(values.detach(), size)
    return rows.reshape(size, -1, values.shape[-1])


def _embedding(call: LayerCall, b: Tensor, size: int) -> Rows:
    weight = call.argument("weight")
    index = call.input.reshape(size, -1)
    right = b.reshape(size, index.shape[1], -1)
    padding = padding_row(call)
    if padding is not None:
        right = right * (index != padding)[..., None]
    return Rows(index, right, len(weight))


def _convolution(call: LayerCall, b: Tensor, options: dict) -> dict[str, Part]:
    """Gram matrices where positions are few, else one convolution with a group per sample."""
    size, a, weight = len(b), call.input.detach().to(b.dtype), call.argument("weight").detach()
    flat = b.flatten(2).transpose(1, 2)  # [B, L, O]
    parts: dict[str, Part] = {"bias": Dense(flat.sum(1))}
    if "weight" in call.sources:
        entries, positions = weight[0].numel(), flat.shape[1]
        plain = a.ndim == 4 and not options["transposed"] and options["groups"] == 1
        if plain and positions * (entries + len(weight)) < entries * len(weight):
            named = {n: options[n] for n in ("dilation", "padding", "stride")}
            patches = F.unfold(a, tuple(weight.shape[2:]), **named).transpose(1, 2)  # [B, L, C k]
            parts["weight"] = Outer(flat, patches)
        else:
            groups = options["groups"] * size
            _, dw, _ = torch.ops.aten.convolution_backward(
                b.reshape(1, -1, *b.shape[2:]),
                a.reshape(1, -1, *a.shape[2:]),
                weight.to(b.dtype).repeat(size, *[1] * (weight.ndim - 1)),
                None,
                **{**options, "groups": groups},
                output_mask=[False, True, False],
            )
            parts["weight"] = Dense(dw.reshape(size, -1))
    return {name: part for name, part in parts.items() if name in call.sources}


def _one_by_one(call: LayerCall, b: Tensor, size: int) -> dict[str, Part]:
    """Any other layer with the batch first: its weight gradient, sample after sample."""
    position = call.rule.input
    rows: dict[str, list[Tensor]] = {name: [] for name in call.sources}
    for i in range(size):
        args = list(call.args)
        args[position] = call.input[i : i + 1]
        one = LayerCall(call.rule, tuple(args), call.kwargs, call.sources)
        for name, g in one.weight_gradients(b[i : i + 1]).items():
            rows[name].append(g.flatten())
    return {name: Dense(torch.stack(gradients)) for name, gradients in rows.items()}
