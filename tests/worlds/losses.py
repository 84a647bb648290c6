"""Losses that a world hands to the step: (output, labels) -> one loss per sample [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Any, Tensor], Tensor]


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output."""
    if isinstance(output, dict):
        return output["logits"]
    return output if isinstance(output, Tensor) else output.logits


def smoothed(output: Any, labels: Tensor) -> Tensor:
    """A function: cross-entropy with smoothed labels."""
    return F.cross_entropy(logits_of(output), labels, label_smoothing=0.1, reduction="none")


class Focal(nn.Module):
    """A module without buffers."""

    def forward(self, output: Any, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits_of(output), labels, reduction="none")
        return (1 - (-loss).exp()) ** 2 * loss


class Running(nn.Module):
    """Margins by a running mean of the logits' size, which a training forward moves (AdaFace)."""

    def __init__(self, reassigned: bool) -> None:
        super().__init__()
        self.reassigned = reassigned
        self.register_buffer("size", torch.ones(()))

    def forward(self, output: Any, labels: Tensor) -> Tensor:
        logits = logits_of(output)
        size = self.size.clone()
        if self.training:
            seen = logits.detach().abs().mean().to(self.size.dtype)
            if self.reassigned:
                self.size = 0.7 * self.size + 0.3 * seen
            else:
                self.size.mul_(0.7).add_(seen, alpha=0.3)
        return F.cross_entropy(logits / (0.5 + size), labels, reduction="none")


def squares(output: Any, labels: Tensor) -> Tensor:
    """Regression of several targets."""
    return (logits_of(output) - labels).square().mean(1)


def multi_label(output: Any, labels: Tensor) -> Tensor:
    """Every class a yes or no."""
    loss = F.binary_cross_entropy_with_logits(logits_of(output), labels, reduction="none")
    return loss.mean(1)


def contrastive(output: Any, labels: Tensor) -> Tensor:
    """Each sample against the other samples of the batch: every loss depends on all of them."""
    x = logits_of(output)
    similarity = x @ x.T / 2
    same = labels[:, None] == labels[None, :]
    return similarity.logsumexp(1) - (similarity * same).sum(1) / same.sum(1)


# name -> how it is made; None is the step's own cross-entropy
LOSSES: dict[str, Callable[[], Loss | None]] = {
    "cross_entropy": lambda: None,
    "tokens": lambda: None,
    "smoothed": lambda: smoothed,
    "focal": Focal,
    "running": lambda: Running(False),
    "running_reassigned": lambda: Running(True),
    "squares": lambda: squares,
    "multi_label": lambda: multi_label,
    "contrastive": lambda: contrastive,
}
# those whose labels are not class indices [B]
WITHOUT_CLASSES = ("tokens", "squares", "multi_label")
FLOATING_LABELS = ("squares", "multi_label")


def build_loss(name: str, dtype: torch.dtype) -> Loss | None:
    """The loss, in train mode and in the model's dtype."""
    loss = LOSSES[name]()
    return loss.to(dtype).train() if isinstance(loss, nn.Module) else loss
