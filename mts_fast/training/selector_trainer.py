"""The selector's part of a step: sample weights (rows 1, 2) and its own optimizer step (7, 8)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mts_fast import ops, reference
from mts_fast._check import describe, fail
from mts_fast._isolation import World
from mts_fast.training.batch import SelectorRows

OP = "MTSStep"


@dataclass
class Scorer:
    """A selector and its class weights."""

    selector: nn.Module
    class_weight: Tensor | None  # [C]
    world: World = field(init=False)

    def __post_init__(self) -> None:
        self.world = World(self.selector)

    def logits(self, rows: SelectorRows, h: Tensor) -> Tensor:
        """z [B], in float32 at least: autocast would round p to 3 digits."""
        z = self.selector(*self.arguments(rows, h))
        expected = (len(rows),)
        shapes = f"floating-point logits {expected} or {(*expected, 1)}"
        if not isinstance(z, Tensor) or not z.is_floating_point():
            hint = "return one logit per sample, before the sigmoid"
            fail(TypeError, OP, "selector's output", shapes, describe(z), hint)
        if z.shape not in (expected, (*expected, 1)):
            hint = "return one logit per sample"
            fail(ValueError, OP, "selector's output", shapes, describe(z), hint)
        if torch.is_grad_enabled() and not z.requires_grad:
            hint = "do not detach it, and leave the selector's parameters requires_grad"
            got = "logits without a graph"
            expected_graph = "dependent on the selector's trainable parameters"
            fail(ValueError, OP, "selector's output", expected_graph, got, hint)
        return z.reshape(expected).to(torch.promote_types(z.dtype, torch.float32))

    def arguments(self, rows: SelectorRows, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The selector's arguments: features in its dtype, classes, is_synthetic."""
        dtype = next((p.dtype for p in self.selector.parameters()), h.dtype)
        return h.to(dtype), rows.classes, rows.is_synthetic

    def weights(self, rows: SelectorRows, z: Tensor) -> Tensor:
        """w [B]."""
        return reference.log_weights(z, self._class_weight(rows)).exp()

    def normalized(self, rows: SelectorRows, z: Tensor) -> Tensor:
        """p [B]."""
        return ops.normalize_weights(z.detach(), class_weight=self._class_weight(rows))

    def unweighted(self, rows: SelectorRows, z: Tensor) -> Tensor:
        """p [B] of equal logits: class weights alone count."""
        return self.normalized(rows, torch.zeros_like(z))

    def _class_weight(self, rows: SelectorRows) -> Tensor | None:
        """The class weight of each sample [B]."""
        if self.class_weight is None:
            return None
        return self.class_weight.to(rows.classes.device)[rows.classes]


class SelectorUpdate(NamedTuple):
    """Inputs of the selector's step: samples as they were scored, and the dots of row 6."""

    rows: SelectorRows
    features: Tensor  # h [B, F]
    logits: Tensor  # z [B], with the selector's graph
    p: Tensor  # [B]
    dots: Tensor  # d [B]

    def cotangent(self) -> Tensor:
        """dL_val/dz [B] of row 7."""
        return ops.selector_gradient(self.dots, self.logits.detach(), self.p)


class SelectorTrainer(Protocol):
    """Scores batches and takes the selector's steps."""

    def forward(self, rows: SelectorRows, h: Tensor, *, updates: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B]) of samples with features h; `updates` where a `step` follows."""

    def step(self, update: SelectorUpdate) -> None:
        """One step of the selector's optimizer."""


@dataclass(frozen=True)
class EagerSelectorTrainer:
    """Eager calls; z carries the graph of the step's backward."""

    scorer: Scorer
    optimizer: torch.optim.Optimizer

    def forward(self, rows: SelectorRows, h: Tensor, *, updates: bool) -> tuple[Tensor, Tensor]:
        """(z [B], p [B])."""
        with torch.set_grad_enabled(updates):
            z = self.scorer.logits(rows, h)
        return z, self.scorer.normalized(rows, z)

    def step(self, update: SelectorUpdate) -> None:
        """Backward with the closed-form cotangent, and the optimizer's step."""
        self.optimizer.zero_grad(set_to_none=True)
        # gradients of this optimizer's parameters alone: features may carry the caller's graph
        groups = self.optimizer.param_groups
        parameters = [p for g in groups for p in g["params"] if p.requires_grad]
        update.logits.backward(update.cotangent(), inputs=parameters)
        self.optimizer.step()
        # autocast's cached low-precision weights are stale after the step
        torch.clear_autocast_cache()
