"""Tables whose gradient autograd divides by how often a row occurs in the batch.

Embedding(scale_grad_by_freq=True) has the gradient S g: g is the derivative, S is 1 / count of each
row in the batch. No derivative of the forward or of the gradient knows S. Engines that take
derivatives therefore run the table as y0 + s (y - y0), with its output y0 as a constant and s the
1 / count of each index. The value is y0, and the derivative S g, use by use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mts_fast._isolation import Restoring
from mts_fast.hypergradient.objective import Objective

OPTION = "scale_grad_by_freq=True"
# (table, indices, its output) -> the tensor that replaces the output
Hook = Callable[[nn.Embedding, Tensor, Tensor], Tensor]


def frequency_reasons(objective: Objective) -> list[str]:
    """Why engines that take derivatives cannot run tables with this option."""
    tables = objective.world.frequency_tables
    if not tables:
        return []
    # torch's backward of a bag divides by the counts of other rows than its own
    names = {id(m): path for path, m in objective.model.named_modules()}
    reasons = [
        f"{names.get(id(m)) or 'the loss'}: EmbeddingBag({OPTION}) has a gradient that is no"
        " derivative"
        for m in tables
        if isinstance(m, nn.EmbeddingBag)
    ]
    if objective.is_compiled:
        reasons.append(f"the rows of a table with {OPTION} cannot be counted in a compiled model")
    return reasons


class FrequencyTables:
    """Contexts for the forwards of one linearization; without these tables they do nothing."""

    def __init__(self, objective: Objective) -> None:
        self._tables = objective.world.frequency_tables
        self._outputs: list[Tensor] = []  # of the recorded forward, in the order of calls

    @property
    def unrecorded(self) -> bool:
        """Whether there are tables, and no forward has been recorded."""
        return bool(self._tables) and not self._outputs

    def recording(self) -> Restoring:
        """Around the training forward: keeps every output as the constant of later forwards."""
        return self._hooked(self._record)

    def replaying(self) -> Restoring:
        """Around a forward at other parameters: outputs move by s times as much as they would."""
        constants = iter(self._outputs)

        def moved(table: nn.Embedding, index: Tensor, y: Tensor) -> Tensor:
            constant = next(constants, None)
            if constant is None or constant.shape != y.shape:
                return y  # the calls have changed: the guard checks the dots
            return constant + _share(table, index, y) * (y - constant)

        return self._hooked(moved)

    def differentiable(self) -> Restoring:
        """Around a forward that is differentiated, in either mode and twice."""
        return self._hooked(_differentiable)

    def _record(self, table: nn.Embedding, index: Tensor, y: Tensor) -> Tensor:
        self._outputs.append(y.detach())
        return y

    def _hooked(self, hook: Hook) -> Restoring:
        handles: list[Any] = []

        def called(
            table: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
        ) -> Tensor:
            return hook(table, args[0] if args else kwargs["input"], y)

        def begin() -> None:
            for table in self._tables:
                handles.append(table.register_forward_hook(called, prepend=True, with_kwargs=True))

        def stop() -> None:
            for handle in handles:
                handle.remove()

        return Restoring(stop, begin)


def _differentiable(table: nn.Embedding, index: Tensor, y: Tensor) -> Tensor:
    # the backward of the module's own output divides by the counts, this one's does not
    plain = F.embedding(index, table.weight, table.padding_idx, sparse=table.sparse)
    return y.detach() + _share(table, index, y) * (plain - plain.detach())


def _share(table: nn.Embedding, index: Tensor, y: Tensor) -> Tensor:
    """s, 1 / count of each index [..., 1]."""
    counts = torch.bincount(index.flatten(), minlength=table.num_embeddings)
    return (1 / counts[index].to(y.dtype))[..., None]
