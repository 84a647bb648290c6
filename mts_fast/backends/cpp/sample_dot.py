"""sample_dot by the C++ kernel: schema and fake kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.backends.cpp.eligibility import reasons_against_cpp
from mts_fast.backends.eligibility import samples_same_layout

torch.library.define("mts_fast::sample_dot", "(Tensor x, Tensor y) -> Tensor")


@torch.library.register_fake("mts_fast::sample_dot")
def _fake(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(len(x))


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernel cannot serve these two tensors."""
    dtypes = {str(t.dtype) for t in tensors}
    mixed = [f"its kernel takes one dtype, not {', '.join(sorted(dtypes))}"]
    return reasons_against_cpp(tensors) + (mixed if len(dtypes) > 1 else [])


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """As the reference, which serves tensors whose samples have different memory layouts."""
    if samples_same_layout(x, y):
        return torch.ops.mts_fast.sample_dot(x, y)
    return reference.sample_dot(x, y)
