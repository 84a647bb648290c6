"""Tables whose gradient autograd divides by how often a row occurs in the batch.

Embedding(scale_grad_by_freq=True) has the gradient S g_i: g_i is the derivative, S diagonal with
1 / count of every row. No derivative of the forward or of the gradient knows S, but
<v, S g_i> = <S v, g_i>: engines that take derivatives are given S v as their direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._isolation import Restoring
from mts_fast.hypergradient.objective import Objective
from mts_fast.hypergradient.refused import Refused

OPTION = "scale_grad_by_freq=True"


def frequency_reasons(objective: Objective) -> list[str]:
    """Why the rows of such a table cannot be counted, before any forward."""
    tables = objective.world.frequency_tables
    if not tables:
        return []
    # torch's backward of a bag divides by counts of other rows than its own
    bags = [m for m in tables if isinstance(m, nn.EmbeddingBag)]
    holders = Counter(id(p) for m in objective.world.modules for p in m._parameters.values())
    names = {id(m): path for path, m in objective.model.named_modules()}
    shared = [m for m in tables if holders[id(m.weight)] > 1]
    reasons = [
        f"{names.get(id(m)) or 'the loss'}: its weight, of a gradient with {OPTION}, is another"
        " module's, too"
        for m in shared
    ]
    reasons += [
        f"{names.get(id(m)) or 'the loss'}: EmbeddingBag({OPTION}) has a gradient that is no"
        " derivative"
        for m in bags
    ]
    if objective.is_compiled:
        reasons.append(f"the rows of a table with {OPTION} cannot be counted in a compiled model")
    return reasons


class FrequencyScale:
    """Around one forward: counts the rows that every such table is asked for."""

    def __init__(self, objective: Objective, engine: str) -> None:
        self._objective = objective
        self._engine = engine
        self._tables = objective.world.frequency_tables
        self._counts: dict[Tensor, Tensor] = {}  # by table, [rows]
        self._differing = False
        self.counted = not self._tables  # whether a forward was seen, or none is needed
        self._hooks: list[Any] = []

    def around_forward(self) -> Restoring:
        """A context for that forward."""
        return Restoring(self._stop, self._begin)

    def along(self, direction: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """S v.

        Raises:
            Refused: the forward used a table twice with other counts: its S differs by use.
        """
        if not self._tables:
            return direction
        if self._differing:
            reason = f"a table with {OPTION} is used twice in a forward, with rows of its own each"
            raise Refused(self._engine, [reason])
        scaled = []
        for p, v in zip(parameters, direction, strict=True):
            counts = self._counts.get(p)
            if counts is not None:
                share = 1 / counts.clamp(min=1).to(v.dtype)
                v = v * share.reshape(-1, *[1] * (v.ndim - 1))
            scaled.append(v)
        return scaled

    def _begin(self) -> None:
        self.counted = True
        for table in self._tables:
            self._hooks.append(table.register_forward_pre_hook(self._count, with_kwargs=True))

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _count(self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(table, nn.Embedding)
        rows = args[0] if args else kwargs["input"]
        counts = torch.bincount(rows.flatten(), minlength=table.num_embeddings)
        before = self._counts.setdefault(table.weight, counts)
        self._differing |= before is not counts and not torch.equal(before, counts)
