"""A call's part of every sample's gradient, in the form whose norm is cheapest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class GradientPart(ABC):
    """Gradients of B samples by one argument of one call."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared Euclidean norms [B]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[B, entries of the argument]."""


@dataclass
class DensePart(GradientPart):
    """The gradients themselves."""

    values: Tensor  # [B, n]

    def squares(self) -> Tensor:
        return torch.linalg.vecdot(self.values, self.values)

    def dense(self) -> Tensor:
        return self.values


@dataclass
class OuterPart(GradientPart):
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
        return DensePart(self.dense()).squares()

    def dense(self) -> Tensor:
        return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)


@dataclass
class ScatteredPart(GradientPart):
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


def inner(x: GradientPart, y: GradientPart) -> Tensor:
    """<x_i, y_i> [B] of two parts of one parameter."""
    if isinstance(x, OuterPart) and isinstance(y, OuterPart):
        left = torch.bmm(x.left, y.left.transpose(1, 2))  # [B, T, S]
        return (left * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    if isinstance(x, ScatteredPart) and isinstance(y, ScatteredPart):
        same = x.index[:, :, None] == y.index[:, None, :]
        return (same * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    if isinstance(x, OuterPart) and isinstance(y, ScatteredPart):
        x, y = y, x
    if isinstance(x, ScatteredPart) and isinstance(y, OuterPart):
        at = x.index[:, None, :].expand(-1, y.left.shape[1], -1)
        left = y.left.gather(2, at).transpose(1, 2)  # [B, T, S]
        return (left * torch.bmm(x.right, y.right.transpose(1, 2))).sum((1, 2))
    return torch.linalg.vecdot(x.dense(), y.dense())
