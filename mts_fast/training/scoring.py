"""Rows 1 and 2: the selector's logits and weights of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mts_fast import ops, reference
from mts_fast._check import fail
from mts_fast.training.batch import CheckedBatch


@dataclass(frozen=True)
class Scorer:
    """A selector and the class weights beside it."""

    selector: nn.Module
    class_weight: Tensor | None  # [C]

    def logits(self, batch: CheckedBatch, h: Tensor) -> Tensor:
        """z [B], in float32 at least: autocast would round p to 3 digits."""
        z = self.selector(*self.arguments(batch, h))
        expected = (len(batch),)
        if z.shape not in (expected, (*expected, 1)):
            fail(ValueError, "MTSStep", "selector's output", f"logits {expected}", tuple(z.shape))
        return z.reshape(expected).to(torch.promote_types(z.dtype, torch.float32))

    def arguments(self, batch: CheckedBatch, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the selector is called with: features in its dtype, classes, is_synthetic."""
        dtype = next((p.dtype for p in self.selector.parameters()), h.dtype)
        return h.to(dtype), batch.classes, batch.is_synthetic

    def weights(self, batch: CheckedBatch, z: Tensor) -> Tensor:
        """w [B]."""
        return reference.log_weights(z, self._class_weight(batch)).exp()

    def normalized(self, batch: CheckedBatch, z: Tensor) -> Tensor:
        """p [B]."""
        return ops.normalize_weights(z.detach(), class_weight=self._class_weight(batch))

    def unweighted(self, batch: CheckedBatch, z: Tensor) -> Tensor:
        """p [B] of a selector that trusts every sample alike."""
        return self.normalized(batch, torch.zeros_like(z))

    def _class_weight(self, batch: CheckedBatch) -> Tensor | None:
        """The class weight of each sample [B]."""
        if self.class_weight is None:
            return None
        return self.class_weight.to(batch.classes.device)[batch.classes]


class Lesson(NamedTuple):
    """What the selector learns from: a batch as it scored it, and the dots of row 6."""

    batch: CheckedBatch
    features: Tensor  # h [B, F]
    logits: Tensor  # z [B], with the selector's graph
    p: Tensor  # [B]
    dots: Tensor  # d [B]
