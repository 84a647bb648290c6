"""The selector's side of a step: weights of a batch (rows 1, 2) and its lesson (rows 7, 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mts_fast import ops, reference
from mts_fast._check import fail
from mts_fast.training.batch import CheckedBatch


@dataclass
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

    def cotangent(self) -> Tensor:
        """dL_val/dz [B] of row 7."""
        return ops.selector_gradient(self.dots, self.logits.detach(), self.p)


class Teacher(Protocol):
    """Scores batches and takes the selector's steps."""

    def score(self, batch: CheckedBatch, h: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B]) of a batch with features h; where it `learns`, for a lesson."""

    def teach(self, lesson: Lesson) -> None:
        """One step of the selector's optimizer."""


@dataclass(frozen=True)
class EagerTeacher:
    """Call by call; z carries the graph that the lesson goes back through."""

    scorer: Scorer
    optimizer: torch.optim.Optimizer

    def score(self, batch: CheckedBatch, h: Tensor, *, learns: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B])."""
        with torch.set_grad_enabled(learns):
            z = self.scorer.logits(batch, h)
        return z, self.scorer.normalized(batch, z)

    def teach(self, lesson: Lesson) -> None:
        """Backward with the closed-form cotangent, and the optimizer's step."""
        self.optimizer.zero_grad(set_to_none=True)
        lesson.logits.backward(lesson.cotangent())
        self.optimizer.step()
