"""Training-dynamics scores of samples under a fixed classifier, and forgetting over epochs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap


def gradient_norm(
    model: torch.nn.Module,
    inputs: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Euclidean norm [B] of the gradient of each sample's loss by all trainable parameters.

    torch.func: one gradient per sample, vectorised; the model must be in eval mode.
    """
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def one_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, parameters, (x[None],)), y[None]).sum()

    rows = vmap(grad(one_loss), in_dims=(None, 0, 0))(trainable, inputs, labels)
    squares = [r.detach().flatten(1).square().sum(1) for r in rows.values()]
    return torch.stack(squares).sum(0).sqrt()


def forgetting(correct: Tensor) -> tuple[Tensor, Tensor]:
    """(counts [N], never [N] bool) of a history [epochs, N] of correct predictions.

    A sample correct in one epoch and wrong in the next was forgotten once (Toneva et al. 2019).
    """
    correct = correct.bool()
    return (correct[:-1] & ~correct[1:]).sum(0), ~correct.any(0)
