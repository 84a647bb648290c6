"""Sets `.grad` of parameters as `zero_grad()` and a backward would have left it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._multi_tensor import copies


def set_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> None:
    """Set `.grad` of these parameters, each in memory of its own, and clear it on the optimizer's
    remaining parameters: the optimizer steps every parameter that has a gradient."""
    taking_part = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in taking_part:
                parameter.grad = None
    used: set[int] = set()
    shared = []
    for i, g in enumerate(gradients):
        if g is not None:
            # autograd may return one tensor twice, views of one tensor, or an expanded one;
            # clipping and unscaling write in place
            storage = g.untyped_storage().data_ptr()
            if storage in used or not _is_dense(g):
                shared.append(i)
            used.add(storage)
    values = [g.contiguous() for i in shared if (g := gradients[i]) is not None]
    copied = dict(zip(shared, copies(values), strict=True))
    for i, (parameter, g) in enumerate(zip(parameters, gradients, strict=True)):
        parameter.grad = copied.get(i, g)


def _is_dense(tensor: Tensor) -> bool:
    """Whether every entry has memory of its own."""
    return all(
        step != 0 or size == 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
