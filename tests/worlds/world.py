"""World: everything that one random run of MTSStep is built from, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

# width of every activation, classes of every head; small, so that thousands of worlds are cheap
WIDTH = 4
CLASSES = 3
# length of sequences and signals, side of images, size of the vocabulary, offline features
STEPS = 5
SIDE = 5
VOCABULARY = 7
OFFLINE = 2

Options = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A model, a loss, two optimizers, batches and the step's options; `seed` draws all values.

    source: what the model takes: "vector", "image", "signal", "sequence" or "tokens".
    layers: the stack between input and head, each {"kind": ..., options}.
    head: {"pool", "kind", "output", "frozen"}; see models.py.
    loss: a name of losses.py.
    optimizer, selector: see builders.py.
    batches: {"sizes": one of each call, "validation", "order", "duplicates", "form", ...}.
    precision: "float32", "float64", "bfloat16", "autocast bfloat16" or "autocast float16".
    step: keyword arguments of MTSStep, as JSON.
    events: what the user does before each call: "none", "freeze", "unfreeze", "add_group", ...
    """

    seed: int = 0
    source: str = "vector"
    time_first: bool = False
    layers: list[Options] = field(default_factory=list)
    head: Options = field(default_factory=dict)
    loss: str = "cross_entropy"
    optimizer: Options = field(default_factory=dict)
    selector: Options = field(default_factory=dict)
    batches: Options = field(default_factory=dict)
    precision: str = "float32"
    step: Options = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How often the step is called."""
        return len(self.events)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> World:
        """The world that `to_json` wrote."""
        return cls(**json.loads(text))

    def options(self) -> set[str]:
        """Every choice that this world makes, as words to be counted."""
        return set(_words(self))


def _words(world: World) -> Iterator[str]:
    yield f"source: {world.source}"
    yield f"layout: {'time first' if world.time_first else 'batch first'}"
    yield f"precision: {world.precision}"
    yield f"loss: {world.loss}"
    for layer in world.layers:
        yield f"layer: {layer['kind']}"
        for name, value in layer.items():
            if name in ("frozen", "packed", "bidirectional") and value:
                yield f"layer: {name}"
            elif name != "kind" and value not in (False, 0, 0.0, None):
                yield f"layer: {layer['kind']}: {name}" + ("" if value is True else f" {value}")
    parts = {
        "head": world.head,
        "optimizer": world.optimizer,
        "selector": world.selector,
        "step": world.step,
        "batches": world.batches,
    }
    for part, options in parts.items():
        for name, value in options.items():
            if name in ("sizes", "lr", "validation"):
                continue
            if isinstance(value, float) and value:
                value = "set"
            yield f"{part}: {name} {value}"
    sizes = world.batches["sizes"]
    if sizes[0] == 1:
        yield "batches: first of one sample"
    if len(set(sizes)) > 1:
        yield "batches: sizes differ"
    if STEPS in sizes and world.source in ("sequence", "tokens"):
        yield "batches: T == B"
    for event in set(world.events):
        yield f"event: {event}"
