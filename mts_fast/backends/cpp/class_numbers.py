"""Class numbers small enough to index the tables of the C++ and CUDA kernels."""

from __future__ import annotations

from torch import Tensor

# a table of 2^20 classes is a few megabytes; larger labels are identifiers, as those of WordNet
MOST = 2**20


def table_numbers(labels: Tensor) -> tuple[Tensor, int]:
    """(labels [N], C): the same classes renumbered to [0, C), so that tables of C stay small.
    labels are integers >= 0, at least one."""
    most = int(labels.max())
    if most < MOST:
        return labels, most + 1
    names, labels = labels.unique(return_inverse=True)
    return labels, len(names)
