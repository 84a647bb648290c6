"""Baselines for theta' and kappa v: the reference per tensor, and torch's foreach operations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast.ops.virtual_update import optimizer_states
from mts_fast.reference.virtual_update import State

OPTIMIZERS = {
    "sgd": lambda p, **options: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=1e-4, **options
    ),
    "adamw": lambda p, **options: torch.optim.AdamW(p, lr=1e-3, **options),
}


@dataclass(frozen=True)
class Update:
    """Parameters, their gradients, and the optimizer state after one step."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[State]

    @property
    def arguments(self):
        return self.parameters, self.gradients, self.states


def draw_update(shapes, optimizer, device="cpu"):
    """Random parameters of these shapes, with the named optimizer's state after one step."""
    g = torch.Generator(device).manual_seed(0)
    draw = lambda: [torch.randn(s, generator=g, device=device) for s in shapes]  # noqa: E731
    leaves = [torch.nn.Parameter(t) for t in draw()]
    stepped_optimizer = stepped(optimizer, leaves, draw())
    states = list(optimizer_states(stepped_optimizer).values())
    return Update([p.detach() for p in leaves], draw(), states)


def stepped(optimizer, leaves, gradients, **options):
    """torch's named optimizer after one step."""
    result = OPTIMIZERS[optimizer](leaves, **options)
    for p, gradient in zip(leaves, gradients, strict=True):
        p.grad = gradient
    result.step()
    return result


def one_by_one(parameters, gradients, states):
    """theta' of each tensor, by the reference."""
    return list(map(reference.virtual_update, parameters, gradients, states))


def directions_one_by_one(parameters, gradients, states, along, largest):
    """kappa v of each tensor, by the reference."""
    rows = zip(parameters, gradients, states, along, strict=True)
    return [reference.hypergradient_direction(*row, None, largest) for row in rows]


def foreach_sgd(parameters, gradients, states):
    s = states[0]
    step = torch._foreach_add(gradients, parameters, alpha=s.weight_decay)
    torch._foreach_add_(step, [state.buffer for state in states], alpha=s.momentum)
    return torch._foreach_add(parameters, step, alpha=-s.lr)


def foreach_adamw(parameters, gradients, states):
    s = states[0]
    beta1, steps = s.betas[0], s.step + 1
    mean = torch._foreach_lerp([state.exp_avg for state in states], gradients, 1 - beta1)
    root = _foreach_root(gradients, states)
    torch._foreach_add_(root, s.eps)
    updated = torch._foreach_mul(parameters, 1 - s.lr * s.weight_decay)
    torch._foreach_addcdiv_(updated, mean, root, -s.lr / (1 - beta1**steps))
    return updated


def foreach_direction_sgd(parameters, gradients, states, along):
    """kappa is lr, for steps without dampening and nesterov."""
    return torch._foreach_mul(along, states[0].lr)


def foreach_direction_adamw(parameters, gradients, states, along):
    """The closed form that `reference` derives; it needs second moments above 0."""
    s = states[0]
    (beta1, beta2), steps = s.betas, s.step + 1
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    root = _foreach_root(gradients, states)
    rise = torch._foreach_mul([state.exp_avg for state in states], gradients)
    torch._foreach_mul_(rise, -beta1 * (1 - beta2))
    squares = [state.exp_avg_sq for state in states]
    torch._foreach_add_(rise, squares, alpha=beta2 * (1 - beta1))
    torch._foreach_div_(rise, correction1 * correction2)
    torch._foreach_div_(rise, root)
    torch._foreach_add_(rise, s.eps * (1 - beta1) / correction1)
    torch._foreach_add_(root, s.eps)
    torch._foreach_div_(rise, root)
    torch._foreach_div_(rise, root)
    torch._foreach_mul_(rise, along)
    torch._foreach_mul_(rise, s.lr)
    return rise


def foreach_perturb(parameters, direction, step):
    """Parameters plus and minus `step` times the direction divided by its norm."""
    epsilon = step / torch.stack(torch._foreach_norm(direction)).norm()
    moved = torch._foreach_mul(direction, epsilon)
    return torch._foreach_add(parameters, moved), torch._foreach_sub(parameters, moved)


def _foreach_root(gradients, states):
    """Root of the bias-corrected second moment."""
    beta2 = states[0].betas[1]
    square = torch._foreach_mul([state.exp_avg_sq for state in states], beta2)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
    torch._foreach_div_(square, 1 - beta2 ** (states[0].step + 1))
    torch._foreach_sqrt_(square)
    return square


FOREACH = {"sgd": foreach_sgd, "adamw": foreach_adamw}
FOREACH_DIRECTION = {"sgd": foreach_direction_sgd, "adamw": foreach_direction_adamw}
