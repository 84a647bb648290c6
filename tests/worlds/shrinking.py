"""Makes a failing world smaller while it fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from worlds.runner import run
from worlds.world import World

PLAIN_STEP = {
    "engine": "auto",
    "schedule": "exact",
    "memory": "fast",
    "micro_batch": None,
    "backend": "auto",
    "class_weight": None,
    "hypergradient_lr": None,
    "validation_mode": "eval",
    "online_features": False,
    "online_k": 3,
    "online_momentum": None,
    "selector_every": 1,
    "warmup_steps": 0,
    "max_grad_norm": None,
}
PLAIN_BATCHES = {
    "order": "shuffled",
    "duplicates": False,
    "form": "tensor",
    "features": True,
    "classes": False,
    "selector_batch": 0,
    "ignored_sample": False,
}
PLAIN_OPTIMIZER = {
    "kind": "SGD",
    "lr": 0.1,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "nesterov": False,
    "dampening": 0.0,
    "maximize": False,
    "groups": 1,
    "lr_tensor": False,
    "without_frozen": False,
}


def shrunk(world: World) -> World:
    """The smallest world that greedy steps reach."""
    kind = run(world).signature
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(world):
            try:
                same = run(candidate).signature == kind
            except Exception:  # a candidate that cannot be built is no world
                same = False
            if same:
                world, smaller = candidate, True
                break
    return world


def _smaller(world: World) -> Iterator[World]:
    if world.calls > 1:
        sizes = world.batches["sizes"][:-1]
        batches = {**world.batches, "sizes": sizes}
        yield replace(world, events=world.events[:-1], batches=batches)
    for k in range(len(world.layers)):
        if len(world.layers) > 1:
            yield replace(world, layers=[*world.layers[:k], *world.layers[k + 1 :]])
    for name, value in (("precision", "float64"), ("loss", "cross_entropy"), ("time_first", False)):
        if getattr(world, name) != value:
            yield replace(world, **{name: value})
    for k, event in enumerate(world.events):
        if event != "none":
            yield replace(world, events=[*world.events[:k], "none", *world.events[k + 1 :]])
    if world.optimizer != PLAIN_OPTIMIZER:
        yield replace(world, optimizer=PLAIN_OPTIMIZER)
    yield from _plainer(world, "optimizer", {"groups": 1, "lr_tensor": False, "weight_decay": 0.0})
    yield from _plainer(world, "step", PLAIN_STEP)
    yield from _plainer(world, "batches", PLAIN_BATCHES)
    yield from _plainer(world, "head", {"output": "tensor", "embedding": {}})
    yield from _plainer(world, "selector", {"own": False, "scheduler": False})
    for k, layer in enumerate(world.layers):
        for name in layer:
            if name not in ("kind", "function"):
                lighter = {n: v for n, v in layer.items() if n != name}
                yield replace(world, layers=[*world.layers[:k], lighter, *world.layers[k + 1 :]])


def _plainer(world: World, part: str, plain: dict[str, Any]) -> Iterator[World]:
    options = getattr(world, part)
    for name, value in plain.items():
        if options.get(name) != value:
            yield replace(world, **{part: {**options, name: value}})
