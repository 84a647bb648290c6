"""label_agreement by the C++ and CUDA kernels: schema and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "mts_fast::label_agreement",
    "(Tensor similarity, Tensor neighbors, Tensor labels, float epsilon) -> (Tensor, Tensor)",
)


@torch.library.register_fake("mts_fast::label_agreement")
def _fake(
    similarity: Tensor, neighbors: Tensor, labels: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    rows = similarity.shape[0]
    return similarity.new_empty(rows), similarity.new_empty(rows)


def label_agreement(
    similarity: Tensor, neighbors: Tensor, labels: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.mts_fast.label_agreement(similarity, neighbors, labels, epsilon)
