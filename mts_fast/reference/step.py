"""One whole MTS step, rows 1 to 9 of the algorithm from top to bottom, in plain PyTorch.

Written to be read beside the paper (arXiv 2606.00571), and the oracle of `MTSStep`. It costs what
double backward costs; nothing here is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mts_fast.reference.cross_entropy import cross_entropy
from mts_fast.reference.hypergradient import hypergradient_dots
from mts_fast.reference.virtual_update import State, kappa, virtual_update
from mts_fast.reference.weights import log_weights, normalize_weights, selector_gradient


@dataclass(frozen=True)
class Batch:
    """inputs [B, ...], labels [B], is_synthetic [B], features [B, F]: all that the selector reads."""

    inputs: Tensor
    labels: Tensor
    is_synthetic: Tensor
    features: Tensor


@dataclass(frozen=True)
class Trace:
    """What the step computed on the way: p [B], losses [B], v and dL_val/dphi by name, dots [B]."""

    p: Tensor
    losses: Tensor
    val_gradient: dict[str, Tensor]
    dots: Tensor
    selector_gradient: dict[str, Tensor]


def mts_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    optimizer_state: dict[str, State],  # of each trainable parameter, as it stands before the step
    selector: nn.Module,
    selector_optimizer: torch.optim.Optimizer,
    batch: Batch,
    val_inputs: Tensor,
    val_labels: Tensor,
    *,
    selector_batch: Batch | None = None,
    hypergradient_lr: float | None = None,
) -> Trace:
    """Update the selector and the classifier once, in place; returns the intermediate quantities."""
    theta = {n: p for n, p in model.named_parameters() if n in optimizer_state}
    phi = dict(selector.named_parameters())
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def losses_of(b: Batch, statistics: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model.train(), (theta, statistics), b.inputs), b.labels)

    # rows 1, 2: w = sigmoid(MLP(h)), p = w / sum w
    z = selector(batch.features, batch.labels, batch.is_synthetic)  # [B]
    p = normalize_weights(log_weights(z.detach()))  # [B]

    # row 3: L = sum p l, BatchNorm statistics moving in the copies
    losses = losses_of(batch, buffers)  # [B]
    g = dict(zip(theta, torch.autograd.grad(p @ losses, list(theta.values()), retain_graph=True)))

    # row 4: theta' = U(theta, g; live optimizer state)
    virtual = {
        n: virtual_update(t.detach(), g[n], optimizer_state[n]).requires_grad_()
        for n, t in theta.items()
    }

    # row 5: v = grad of the mean validation loss at theta', eval mode
    val_logits = functional_call(model.eval(), (virtual, buffers), val_inputs)
    val_loss = cross_entropy(val_logits, val_labels).mean()
    v = dict(zip(virtual, torch.autograd.grad(val_loss, list(virtual.values()))))

    # row 6: d_i = <kappa v, grad l_i>, on the selector's batch
    direction = [
        kappa(t.detach(), g[n], optimizer_state[n], hypergradient_lr) * v[n]
        for n, t in theta.items()
    ]
    if selector_batch is None:
        meta, z_meta, losses_meta = batch, z, losses
    else:
        meta = selector_batch
        z_meta = selector(meta.features, meta.labels, meta.is_synthetic)
        losses_meta = losses_of(meta, {n: b.clone() for n, b in buffers.items()})
    dots = hypergradient_dots(losses_meta, list(theta.values()), direction)  # [B]

    # rows 7, 8: the cotangent of the logits, one selector backward, the selector's step
    p_meta = normalize_weights(log_weights(z_meta.detach()))
    cotangent = selector_gradient(dots, z_meta.detach(), p_meta)
    for q, dq in zip(phi.values(), torch.autograd.grad(z_meta, list(phi.values()), cotangent)):
        q.grad = dq
    selector_optimizer.step()

    # row 9: weights again with the new phi, then the real step
    with torch.no_grad():
        z_new = selector(batch.features, batch.labels, batch.is_synthetic)
    p_new = normalize_weights(log_weights(z_new))
    for t, dt in zip(theta.values(), torch.autograd.grad(p_new @ losses, list(theta.values()))):
        t.grad = dt
    optimizer.step()
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    return Trace(p, losses.detach(), v, dots, {n: q.grad for n, q in phi.items()})
