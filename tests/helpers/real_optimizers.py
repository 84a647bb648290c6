"""torch's own optimizers over a few parameters, after some real steps."""

import copy

import torch

from mts_fast.ops import trainable_parameters


def ones(*shape):
    """A parameter full of ones."""
    return torch.nn.Parameter(torch.ones(*shape))


def step_with(optimizer, gradients):
    """Sets the gradients of the parameters and runs the optimizer's step."""
    for p, g in zip(trainable_parameters(optimizer), gradients, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


def stepped(rule, shapes, steps, gradients_like, device, dtype=torch.float64, **more):
    """An optimizer of `rule` (class and options) after some real steps, and its parameters.
    `gradients_like(parameters, seed)` makes the gradients of one step."""
    cls, options = rule
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]
    optimizer = cls(parameters, **{**options, **more})
    for seed in range(steps):
        step_with(optimizer, gradients_like(parameters, seed))
    return optimizer, parameters


def real_step(optimizer, parameters, gradients):
    """The parameters after torch's step, which runs on a copy."""
    clone = copy.deepcopy((optimizer, parameters))
    step_with(clone[0], gradients)
    return [p.detach() for p in clone[1]]
