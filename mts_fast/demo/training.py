"""Small classifiers, plain training of them on batches of indices, and their accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mts_fast.demo.data import CLASSES, LabelledImages

# after every step: indices [B], logits [B, CLASSES]
Watch = Callable[[Tensor, Tensor], None]
EVALUATION_BATCH = 4096


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one scenario."""

    data: str
    steps: int
    batch_size: int = 512
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    selector_lr: float = 4e-3
    selector_weight_decay: float = 1e-4
    selector_every: int = 1
    hypergradient_lr: float = 0.05
    warmup_share: float = 0.2  # of the steps: unweighted classifier while the selector learns
    online_momentum: float = 0.9
    engine: str = "auto"
    compute: int | float | str | None = None  # samples of a batch that a step computes; None: all


SETTINGS = {
    "coloured-digits": Settings("coloured-digits", steps=1000),
    "coloured-fashion": Settings("coloured-fashion", steps=1600),
    "digits": Settings("digits", steps=600, batch_size=128, selector_lr=5e-3),
    "fashion": Settings("fashion", steps=1600),
}
# pixels of an image, all channels
WIDTHS = {"coloured-digits": 192, "coloured-fashion": 588, "fashion": 196}


def build_classifier(data: str) -> nn.Module:
    """A small CNN for grey 8 x 8 digits, an MLP for all others."""
    if data == "digits":
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )
    return nn.Sequential(
        nn.Flatten(), nn.Linear(WIDTHS[data], 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: Settings
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Nesterov SGD with a cosine over all steps."""
    optimizer = torch.optim.SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)


def epochs(size: int, settings: Settings, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of `settings.steps` batches: epochs of random permutations."""
    batch_size = min(settings.batch_size, size)
    count = 0
    while True:
        for indices in torch.randperm(size, generator=generator).split(batch_size):
            if len(indices) < batch_size:
                continue
            yield indices
            count += 1
            if count == settings.steps:
                return


def train_classifier(
    images: LabelledImages,
    batches: Iterable[Tensor],
    settings: Settings,
    seed: int,
    *,
    watch: Watch | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """Plain training on `settings.steps` batches of indices; `model` goes on from there."""
    if model is None:
        torch.manual_seed(seed)
        model = build_classifier(settings.data)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = build_optimizer(trainable, settings)
    model.train()
    for indices in islice(batches, settings.steps):
        logits = model(images.images[indices])
        optimizer.zero_grad()
        F.cross_entropy(logits, images.labels[indices]).backward()
        optimizer.step()
        schedule.step()
        if watch is not None:
            watch(indices, logits.detach())
    return model.eval()


def logits_of(model: nn.Module, images: LabelledImages) -> Tensor:
    """[N, CLASSES], the model in eval mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in images.images.split(EVALUATION_BATCH)])


def label_probability(model: nn.Module, images: LabelledImages) -> Tensor:
    """[N]: the probability that the model gives each image's label."""
    probabilities = logits_of(model, images).softmax(1)
    return probabilities.gather(1, images.labels[:, None]).flatten()


def accuracy(model: nn.Module, images: LabelledImages) -> float:
    """Share of images classified rightly."""
    return (logits_of(model, images).argmax(1) == images.labels).double().mean().item()


def worst_group(
    model: nn.Module, images: LabelledImages, groups: Tensor | None, least: int = 20
) -> float | None:
    """Accuracy in the worst group [N] of at least `least` images; None without groups."""
    if groups is None:
        return None
    right = (logits_of(model, images).argmax(1) == images.labels).double()
    sizes = groups.bincount()
    sums = torch.zeros(len(sizes), dtype=right.dtype).index_add_(0, groups, right)
    accuracies = (sums / sizes)[sizes >= least]
    return float(accuracies.min()) if len(accuracies) else None
