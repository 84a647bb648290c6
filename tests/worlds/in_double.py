"""The objects of a world in float64, and small functions of the oracle on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from worlds.builders import Objects
from worlds.generators import Generators
from worlds.losses import logits_of
from worlds.world import World

# kappa is 0 where the root of the second moment is below this many roundings of the largest

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Snapshot:
    """A world before a call; `running` are the online features' statistics, if they run."""

    world: World
    objects: Objects
    generators: Generators
    running: dict[str, Tensor]
    steps: int

    @classmethod
    def take(cls, world: World, objects: Objects, running: dict[str, Tensor], steps: int) -> Any:
        """Copies of everything."""
        return cls(world, copied(objects), Generators.now(), dict(running), steps)


def copied(objects: Objects) -> Objects:
    """Copies that belong together; the scheduler is left out."""
    parts = objects.model, objects.optimizer, objects.loss
    selector = objects.selector, objects.selector_optimizer
    return Objects(*copy.deepcopy((*parts, *selector)))


def in_double(objects: Objects) -> Objects:
    """Copies in float64."""
    objects = copied(objects)
    for module in (objects.model, objects.loss, objects.selector):
        if isinstance(module, nn.Module):
            module.double()
    for optimizer in (objects.optimizer, objects.selector_optimizer):
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and name not in ("step", "mu_product"):
                    state[name] = value.double()
    return objects


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Per sample [B]; of a sequence the mean over what is not ignored (-100), or 0."""
    logits = logits_of(output)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != -100
    target = labels.masked_fill(~counted, 0)[..., None]
    loss = logits.logsumexp(-1) - logits.gather(-1, target)[..., 0]
    loss = loss * counted
    return loss if labels.ndim == 1 else loss.sum(1) / counted.sum(1).clamp(min=1)


def score(selector: nn.Module, h: Tensor, classes: Tensor, synthetic: Tensor) -> Tensor:
    """z [B] of a selector's parameters, by their names."""
    named = dict(selector.named_parameters())
    parts = [h.to(next(iter(named.values())).dtype)]
    for name, rows in (("class_embed", classes), ("group_embed", synthetic.long())):
        if f"{name}.weight" in named:
            parts.append(named[f"{name}.weight"][rows])
    x = torch.cat(parts, 1)
    layers = sorted({int(n.split(".")[1]) for n in named if n.startswith("mlp.")})
    for k in layers:
        x = x if k == layers[0] else x.relu()
        x = F.linear(x, named[f"mlp.{k}.weight"], named[f"mlp.{k}.bias"])
    z = x.reshape(-1)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def per_sample(values: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """The gradient of every value [B] by each parameter: [B, *shape], or None where unused."""
    rows = []
    for i in range(len(values)):
        unit = torch.zeros_like(values)
        unit[i] = 1
        if not values.requires_grad:
            return [None] * len(parameters)
        gradients = grad(values, parameters, unit, retain_graph=True, allow_unused=True)
        rows.append([None if g is None else g.to_dense() for g in gradients])
    return [
        None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
    ]
