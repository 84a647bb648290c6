"""A selection problem with a known truth, and its name on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mts_fast.demo.data.images import LabelledImages

CLASSES = 10
# marks real images among the kinds
REAL = -1
DATA = ("coloured-digits", "coloured-fashion", "digits", "fashion")


@dataclass(frozen=True)
class Scenario:
    """Images [N, C, H, W] in [0, 1] with labels [N]: the pool to select from, and clean sets.

    A recipe that uses weights takes a share of every batch from `clean`, and draws the rest from
    the pool's `candidates`.
    """

    pool: LabelledImages  # real images first, then synthetic ones
    kind: Tensor  # [N] REAL, or an index into `kinds`
    kinds: tuple[str, ...]
    helpful: tuple[str, ...]  # the kinds that an oracle would take
    clean: LabelledImages
    candidates: Tensor  # [N] bool
    val: LabelledImages
    test: LabelledImages
    groups: Tensor | None = None  # [N] of the pool, where groups are known
    val_groups: Tensor | None = None
    test_groups: Tensor | None = None

    @property
    def is_synthetic(self) -> Tensor:
        """[N] bool."""
        return self.kind != REAL

    @property
    def is_helpful(self) -> Tensor:
        """[N] bool: synthetic samples of a kind that helps."""
        return torch.isin(self.kind, torch.tensor([self.kinds.index(k) for k in self.helpful]))


def make_scenario(
    data: str, seed: int, root: str | None = None, changes: Mapping[str, Any] | None = None
) -> Scenario:
    """The scenario of one of DATA for one seed.

    Args:
        data: one of DATA.
        seed: of all draws.
        root: folder of Fashion-MNIST's files; default: where they usually are.
        changes: of the coloured scenarios: `val_per_class`, and `shares` of KINDS.
    """
    from mts_fast.demo.data import coloured, planted

    makers: dict[str, Callable[..., Scenario]] = {
        "coloured-digits": coloured.coloured_digits,
        "coloured-fashion": coloured.coloured_fashion,
        "digits": planted.planted_digits,
        "fashion": planted.planted_fashion,
    }
    generator = torch.Generator().manual_seed(seed)
    return makers[data](generator, root, **(changes or {}))
