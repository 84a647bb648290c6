"""Ranks within classes."""

from __future__ import annotations

import torch
from torch import Tensor


def percentile_rank(values: Tensor, labels: Tensor) -> Tensor:
    """rank / (n - 1) [N] among the n values of one's class, ascending, ties in order of index; 0
    for a class of one. values [N], labels [N]."""
    order, labels, first, counts = by_class(values, labels)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[labels[order]]
    return rank.to(values.dtype) / (counts - 1).clamp(min=1)[labels].to(values.dtype)


def class_median(values: Tensor, labels: Tensor) -> Tensor:
    """Lower median [N] of the values of one's class. values [N], labels [N]."""
    order, labels, first, counts = by_class(values, labels)
    return values[order[first + (counts - 1) // 2]][labels]


def by_class(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order [N], labels [N], first [C], counts [C]): indices sorted by class, value, index; labels
    renumbered from 0 without gaps; where each class begins in the order, and its size."""
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    order = values.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    return order, labels, counts.cumsum(0) - counts, counts
