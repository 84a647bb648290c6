"""Class numbers as the kernels' tables want them."""

from __future__ import annotations

from torch import Tensor

# tables over so many classes are a few megabytes; larger numbers are names, as of WordNet
MOST = 2**20


def table_numbers(labels: Tensor) -> tuple[Tensor, int]:
    """(labels [N], C): the same classes with numbers in [0, C), so that tables of C stay small.
    labels are integers >= 0, at least one."""
    most = int(labels.max())
    if most < MOST:
        return labels, most + 1
    names, labels = labels.unique(return_inverse=True)
    return labels, len(names)
