"""Row 4, with the gradient clipped or not, and what carries row 5's gradient back to row 3's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast import ops
from mts_fast._multi_tensor import inner_product, multiples, sums, total_norm
from mts_fast._sharding import Sharding
from mts_fast.ops.virtual_update import ScaledDirection
from mts_fast.reference.clipping import NORM_EPS, clip_factor
from mts_fast.training.sharded import virtual_update_of_shards


@dataclass(frozen=True)
class Clip:
    """g_c = s g with s = min(1, c / (n + 1e-6)) and n = |g|, over the shards of all ranks."""

    gradient: Sequence[Tensor | None]
    norm: Tensor  # n []
    factor: Tensor  # s []
    sharding: Sharding | None

    @classmethod
    def to(
        cls, max_norm: float, gradient: Sequence[Tensor | None], sharding: Sharding | None
    ) -> Clip:
        """The clip of a gradient to the norm c; nothing waits for the device."""
        present = [g for g in gradient if g is not None]
        norm = total_norm(present) if present else torch.zeros(())
        if sharding is not None:
            norm = sharding.total(norm.double().square()).sqrt().to(norm.dtype)
        return cls(gradient, norm, clip_factor(norm, max_norm), sharding)

    def clipped(self) -> list[Tensor | None]:
        """g_c."""
        present = [i for i, g in enumerate(self.gradient) if g is not None]
        made = multiples([g for g in self.gradient if g is not None], self.factor)
        clipped: list[Tensor | None] = [None] * len(self.gradient)
        for i, g in zip(present, made, strict=True):
            clipped[i] = g
        return clipped

    def transposed(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """(d g_c / d g)^T u = s (u - (u . g) g / (n (n + 1e-6))), a rank-one correction; u where
        nothing is clipped."""
        pairs = [(i, g) for i, g in enumerate(self.gradient) if g is not None]
        gradient = [g for _, g in pairs]
        along = [direction[i] for i, _ in pairs]
        dtype = torch.promote_types(self.norm.dtype, torch.float32)
        product = inner_product(along, gradient, dtype)
        if self.sharding is not None:
            product = self.sharding.total(product)
        norm, factor = self.norm.to(dtype), self.factor.to(dtype)
        size = (norm * (norm + NORM_EPS)).clamp(min=torch.finfo(dtype).tiny)  # 0 without a gradient
        part = torch.where(factor < 1.0, factor * product / size, 0.0)
        result = list(direction)
        made = sums(multiples(along, factor), multiples(gradient, -part))
        for (i, _), u in zip(pairs, made, strict=True):
            result[i] = u
        return result


@dataclass(frozen=True)
class VirtualStep:
    """theta' = U(g_c), and kappa with the clip's derivative."""

    update: ops.VirtualUpdate
    clip: Clip | None

    @classmethod
    def take(
        cls,
        optimizer: torch.optim.Optimizer,
        gradient: list[Tensor | None],
        *,
        sharding: Sharding | None,
        max_norm: float | None,
    ) -> VirtualStep:
        """The step from row 3's gradient, or from its shards; max_norm None clips nothing."""
        clip = None if max_norm is None else Clip.to(max_norm, gradient, sharding)
        if clip is not None:
            gradient = clip.clipped()
        if sharding is None:
            return cls(ops.virtual_update(optimizer, gradient), clip)
        return cls(virtual_update_of_shards(sharding, optimizer, gradient), clip)

    @property
    def parameters(self) -> list[Tensor]:
        """theta'."""
        return self.update.parameters

    def direction(self, v: Sequence[Tensor | None], lr: float | None) -> ScaledDirection:
        """u = kappa^T v, then through the clip: what row 6 takes the samples' gradients along."""
        u = self.update.scale(v, lr)
        return u if self.clip is None else u.with_tensors(self.clip.transposed(u))
