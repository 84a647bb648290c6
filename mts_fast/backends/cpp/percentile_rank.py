"""percentile_rank by the C++ kernel: schema and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.backends.cpp.class_numbers import table_numbers

torch.library.define(
    "mts_fast::percentile_rank", "(Tensor values, Tensor labels, int num_classes) -> Tensor"
)


@torch.library.register_fake("mts_fast::percentile_rank")
def _fake(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def percentile_rank(values: Tensor, labels: Tensor) -> Tensor:
    return torch.ops.mts_fast.percentile_rank(values, *table_numbers(labels))
