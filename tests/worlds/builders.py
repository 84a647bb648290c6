"""A world's objects: selector, optimizers, batches; and what the user does between calls."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worlds.losses import FLOATING_LABELS, WITHOUT_CLASSES, Loss, build_loss
from worlds.models import PRECISIONS, Model, build_model
from worlds.world import CLASSES, OFFLINE, SIDE, STEPS, VOCABULARY, WIDTH, Options, World

HIDDEN = 6


class ColumnSelector(nn.Module):
    """A selector of the user's own, which gives its logits as a column [B, 1]."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.class_embed = nn.Embedding(CLASSES, 2)
        self.group_embed = nn.Embedding(2, 1)
        self.mlp = nn.Sequential(
            nn.Linear(num_features + 3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def forward(self, features: Tensor, classes: Tensor, is_synthetic: Tensor) -> Tensor:
        parts = features, self.class_embed(classes), self.group_embed(is_synthetic.long())
        return self.mlp(torch.cat(parts, dim=1))


@dataclass
class Batch:
    """What a call is given of one batch."""

    inputs: Any
    labels: Tensor
    features: Tensor | None
    is_synthetic: Tensor
    classes: Tensor | None

    @property
    def selector_classes(self) -> Tensor:
        """[B]."""
        return self.labels if self.classes is None else self.classes

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: slice) -> tuple[Any, Tensor]:
        """Inputs and labels of some samples, in tensors of their own."""
        return _nested(self.inputs, lambda x: x[rows].clone()), self.labels[rows].clone()

    def fresh(self) -> Batch:
        """A copy, which a model may write into."""
        inputs = _nested(self.inputs, Tensor.clone)
        return Batch(inputs, self.labels, self.features, self.is_synthetic, self.classes)

    def double(self) -> Batch:
        """Floating-point tensors in float64."""
        inputs, labels, features = (
            _nested(x, lambda t: t.double() if t.is_floating_point() else t)
            for x in (self.inputs, self.labels, self.features)
        )
        return Batch(inputs, labels, features, self.is_synthetic, self.classes)


def _nested(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _nested(v, function) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_nested(v, function) for v in value)
    return value


@dataclass
class Objects:
    """Everything that a step works on."""

    model: Model
    optimizer: torch.optim.Optimizer
    loss: Loss | None
    selector: nn.Module
    selector_optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


def build(world: World, make_selector: Any) -> Objects:
    """All objects of a world; `make_selector` takes the number of features."""
    torch.manual_seed(world.seed)
    np.random.seed(world.seed)
    random.seed(world.seed)
    model = build_model(world)
    dtype = PRECISIONS.get(world.precision, torch.float32)
    loss = build_loss(world.loss, dtype)
    online = world.step["online_k"] + 1 if world.step["online_features"] else 0
    width = online + (OFFLINE if world.batches["features"] else 0)
    selector = ColumnSelector(width) if world.selector["own"] else make_selector(width)
    selector.to(features_dtype(world))
    # weights that differ, so that the selector's part of a step matters
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    selector_optimizer = _optimizer(world.selector["optimizer"], [list(selector.parameters())])
    scheduler = None
    if world.selector["scheduler"]:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(selector_optimizer, 0.5)
    optimizer = _optimizer(world.optimizer, _groups(world, model))
    return Objects(model, optimizer, loss, selector, selector_optimizer, scheduler)


def features_dtype(world: World) -> torch.dtype:
    """Of the selector and what it reads."""
    return torch.float64 if world.precision == "float64" else torch.float32


def _groups(world: World, model: Model) -> list[list[nn.Parameter]]:
    """The parameters of each group; the head is kept for `add_group` where that comes."""
    if "add_group" in world.events:
        late = {id(p) for p in model.head.parameters()}
        parameters = [p for p in model.parameters() if id(p) not in late]
    else:
        parameters = list(model.parameters())
    if world.optimizer["without_frozen"]:
        parameters = [p for p in parameters if p.requires_grad]
    if world.optimizer["groups"] == 1:
        return [parameters]
    return [group for group in (parameters[::2], parameters[1::2]) if group]


def _optimizer(o: Options, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """Every second group with twice the learning rate and no decay."""
    handled = ("groups", "lr_tensor", "without_frozen", "kind", "lr")
    options = {name: value for name, value in o.items() if name not in handled}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    rows = []
    for k, group in enumerate(groups):
        lr = o["lr"] * (1 + k)
        decay = {} if k == 0 else {"weight_decay": 0.0}
        rows.append(
            {"params": group, "lr": torch.tensor(lr) if o.get("lr_tensor") else lr, **decay}
        )
    return getattr(torch.optim, o["kind"])(rows, lr=o["lr"], **options)


def happen(event: str, world: World, objects: Objects) -> None:
    """What the user does before a call."""
    model, optimizer = objects.model, objects.optimizer
    if event == "freeze":
        # all but the head, as far as that was trained
        for parameter in [*model.embed.parameters(), *model.layers.parameters()]:
            parameter.requires_grad_(False)
    elif event == "unfreeze":
        for parameter in [*model.embed.parameters(), *model.layers.parameters()]:
            parameter.requires_grad_(True)
    elif event == "add_group":
        optimizer.add_param_group({"params": list(model.head.parameters())})
    elif event == "learning_rate":
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5
    elif event == "eval":
        model.eval()
    elif event == "train":
        model.train()


def draw_batch(world: World, call: int, role: str, size: int) -> Batch:
    """The batch of a call; role: "train", "validation" or "selector"."""
    o = world.batches
    salt = {"train": 0, "validation": 1, "selector": 2}[role]
    g = torch.Generator().manual_seed(world.seed * 1009 + call * 31 + salt)
    dtype = PRECISIONS.get(world.precision, torch.float32)
    shape = {
        "vector": (WIDTH,),
        "image": (WIDTH, SIDE, SIDE),
        "signal": (WIDTH, STEPS),
        "sequence": (STEPS, WIDTH),
        "tokens": (STEPS,),
    }[world.source]
    if world.source == "tokens":
        x = torch.randint(VOCABULARY, (size, *shape), generator=g)
    else:
        x = torch.randn(size, *shape, generator=g).to(dtype)
    classes = torch.randint(CLASSES, (size,), generator=g)
    labels = _labels(world, size, classes, g, dtype)
    synthetic = torch.randint(2, (size,), generator=g).bool()
    if o["order"] != "shuffled":
        few = max(1, size // 5) if o["order"] == "real_first" else size - max(1, size // 5)
        synthetic = torch.arange(size) >= size - few
        if o["order"] == "synthetic_first":
            synthetic = synthetic.flip(0)
    features = torch.randn(size, OFFLINE, generator=g).to(features_dtype(world))
    if o["duplicates"] and size > 2:
        for tensor in (x, labels, features, classes):
            tensor[1] = tensor[0]
    form = {"tensor": x, "tuple": (x, synthetic), "dict": {"x": x, "synthetic": synthetic}}
    passed = o["classes"] or world.loss in WITHOUT_CLASSES
    return Batch(
        form[o["form"]],
        labels,
        features if o["features"] else None,
        synthetic,
        classes if passed else None,
    )


def _labels(
    world: World, size: int, classes: Tensor, g: torch.Generator, dtype: torch.dtype
) -> Tensor:
    if world.loss in FLOATING_LABELS:
        values = torch.randn(size, CLASSES, generator=g)
        return (values if world.loss == "squares" else (values > 0)).to(dtype)
    if world.loss == "tokens":
        high = VOCABULARY if world.head["kind"] == "tied" else CLASSES
        labels = torch.randint(high, (size, STEPS), generator=g)
        ignored = torch.rand(size, STEPS, generator=g) < 0.3
        if world.batches["ignored_sample"]:
            ignored[-1] = True
        return labels.masked_fill(ignored, -100)
    return classes.clone()
