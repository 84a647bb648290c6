"""One whole MTS step, rows 1 to 9 of docs/algorithm.md from top to bottom, in plain PyTorch.

Written to be read beside the paper (arXiv 2606.00571), and the oracle of `MTSStep`. It costs what
double backward costs; nothing here is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from mts_fast.reference.clipping import clipped_gradients
from mts_fast.reference.cross_entropy import cross_entropy
from mts_fast.reference.hypergradient import hypergradient_dots
from mts_fast.reference.update_rules import State, largest_gradient
from mts_fast.reference.virtual_update import hypergradient_direction, virtual_update
from mts_fast.reference.weights import log_weights, normalize_weights, selector_gradient


@dataclass(frozen=True)
class Batch:
    """inputs [B, ...], labels [B], is_synthetic [B] and the selector's features [B, F]."""

    inputs: Tensor
    labels: Tensor
    is_synthetic: Tensor
    features: Tensor


@dataclass(frozen=True)
class Trace:
    """Values computed on the way: p [B], losses [B], v by parameter name, dots [B2]."""

    p: Tensor
    losses: Tensor
    val_gradient: dict[str, Tensor]
    dots: Tensor


def mts_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: dict[str, State],  # the optimizer's state of each trainable parameter, before the step
    selector: nn.Module,
    selector_optimizer: torch.optim.Optimizer,
    batch: Batch,
    val: tuple[Tensor, Tensor],  # inputs, labels
    *,
    selector_batch: Batch | None = None,
    hypergradient_lr: float | None = None,
    max_grad_norm: float | None = None,
    clip_virtual_step: bool = False,
) -> Trace:
    """Update the selector and the classifier once, in place, and return what was computed."""
    theta = {n: p for n, p in model.named_parameters() if n in states}
    phi = list(selector.parameters())
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def logits(b: Batch) -> Tensor:
        return selector(b.features, b.labels, b.is_synthetic)

    def losses_of(b: Batch, statistics: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, {**theta, **statistics}, b.inputs), b.labels)

    model.train()
    # rows 1, 2: w = sigmoid(MLP(h)), p = w / sum w
    z = logits(batch)  # [B]
    p = normalize_weights(log_weights(z.detach()))  # [B]
    # row 3: L = sum p l, BatchNorm statistics moving in the copies
    losses = losses_of(batch, buffers)  # [B]
    g = grad(p @ losses, list(theta.values()), retain_graph=True)
    # row 4: theta' = U(theta, g; live optimizer state), g clipped where that is asked for
    max_norm = max_grad_norm if clip_virtual_step else None
    free = [dt.requires_grad_() for dt in g]
    clipped = clipped_gradients(free, max_norm)
    g = tuple(dt.detach() for dt in clipped)
    rows = [(n, t.detach(), dt, states[n]) for (n, t), dt in zip(theta.items(), g, strict=True)]
    virtual = {n: virtual_update(t, dt, s).requires_grad_() for n, t, dt, s in rows}
    # row 5: v = grad of the mean validation loss at theta', eval mode
    val_output = functional_call(model.eval(), {**virtual, **buffers}, val[0])
    v = grad(cross_entropy(val_output, val[1]).mean(), list(virtual.values()))
    model.train()
    # row 6: d_i = <kappa v, grad l_i>, kappa v through the clip, on the selector's B2 samples
    largest = largest_gradient(g)
    direction = [
        hypergradient_direction(t, dt, s, dv, hypergradient_lr, largest)
        for (_, t, dt, s), dv in zip(rows, v, strict=True)
    ]
    direction = list(grad(clipped, free, direction))
    batch2, z2, losses2 = batch, z, losses
    if selector_batch is not None:
        batch2, z2 = selector_batch, logits(selector_batch)
        losses2 = losses_of(batch2, {n: b.clone() for n, b in buffers.items()})
    dots = hypergradient_dots(losses2, list(theta.values()), direction)  # [B2]
    # rows 7, 8: the cotangent of the logits, one selector backward, the selector's step
    p2 = normalize_weights(log_weights(z2.detach()))
    selector_optimizer.zero_grad()
    z2.backward(selector_gradient(dots, z2.detach(), p2), inputs=phi)
    selector_optimizer.step()
    # row 9: weights again with the new phi, then the real step
    p_new = normalize_weights(log_weights(logits(batch).detach()))
    optimizer.zero_grad()
    (p_new @ losses).backward(inputs=list(theta.values()))
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(theta.values(), max_grad_norm)
    optimizer.step()
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    return Trace(p, losses.detach(), dict(zip(theta, v, strict=True)), dots)
