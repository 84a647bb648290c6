"""Pools for approximate search, and what it should have found."""

import numpy as np
import torch

WIDTH = 24


def clusters(size, *, dtype=torch.float32, classes=3, seed=3, width=WIDTH):
    """A flat cluster of 8 numbers for each class; a tenth of the labels are wrong, so that label
    agreement varies, and the last class has a twentieth of the samples."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (size,), generator=g)
    labels[torch.randperm(size, generator=g)[: size // 20]] = classes - 1
    basis = torch.randn(classes, 8, width, generator=g)
    x = torch.einsum("nd,nde->ne", torch.randn(size, 8, generator=g), basis[labels])
    x += 2 * torch.randn(classes, width, generator=g)[labels]
    wrong = torch.randperm(size, generator=g)[: size // 10]
    labels[wrong] = torch.randint(classes, (len(wrong),), generator=g)
    return x.to(dtype), labels, torch.rand(size, generator=g) < 0.4


def cosines_within(x, labels, chosen):
    """[N, N] cosines in float64, NaN to oneself, to other classes and to samples not chosen."""
    unit = x.double().numpy()
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, np.nan)
    same = labels[:, None] == labels[None, :]
    return np.where((same & chosen[None, :]).numpy(), cosines, np.nan)


def share_reached(column, cosines, k, rows=slice(None)):
    """Recall of a column [N, k] of cosines by counting, over some rows."""
    best = np.sort(np.where(np.isnan(cosines), -2, cosines)[rows], axis=1)[:, ::-1][:, :k]
    count = (best > -2).sum(1)
    least = np.where(best > -2, best, 2).min(1, keepdims=True)
    hits = (column.double().numpy()[rows] >= least - 1e-5).sum(1)
    return np.minimum(hits, count).sum() / count.sum()
