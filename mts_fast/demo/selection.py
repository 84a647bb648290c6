"""The learned selectors of the demo: MTS with full features, and one that sees only the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mts_fast
from mts_fast.demo.classifiers import (
    Progress,
    Settings,
    batches,
    build_classifier,
    build_optimizer,
    train_weighted,
)
from mts_fast.demo.images import LabelledImages
from mts_fast.demo.scenario import CLASSES, Scenario
from mts_fast.features import PAPER_COLUMNS, FeatureTable, ForgettingCounter

ONLINE_WIDTH = 4
WEIGHING_BATCH = 1024
# number of selectors whose weights are averaged
AVERAGED = 10
# points stored of each curve
CURVE_POINTS = 120

# features [B, F] of pool samples under the current classifier
BatchFeatures = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Selection:
    """A trained classifier, the weights of all pool samples, and curves over training."""

    model: nn.Module
    weights: Tensor  # [N], averaged over the second half of training
    last_weights: Tensor  # [N], of the selector at the end
    curves: dict[str, list[float]] = field(default_factory=dict)


def pool_features(
    scenario: Scenario,
    unselected: nn.Module,
    counter: ForgettingCounter,
) -> FeatureTable:
    """The paper's 13 offline columns of the pool.

    `unselected` is a classifier trained without weights, whose forgetting `counter` counted.
    Pixels serve as embeddings.
    """
    images, labels = scenario.pool.images, scenario.pool.labels
    table = FeatureTable(
        mts_fast.features.distribution_features(images.flatten(1), labels, scenario.is_synthetic)
    )
    table.update(mts_fast.features.training_dynamics(unselected, images, labels))
    table.update(counter.columns())
    return table


class MTSRun:
    """One run of MTSStep on a scenario: the selector, the classifier and their schedules."""

    def __init__(
        self,
        scenario: Scenario,
        settings: Settings,
        seed: int,
        selector: nn.Module,
        features: BatchFeatures,
        *,
        online: bool,
        track_gsnr: bool = False,
    ) -> None:
        self.scenario = scenario
        self.settings = settings
        self.features = features
        self.track_gsnr = track_gsnr
        self.generator = torch.Generator().manual_seed(seed)
        model = build_classifier(settings.data)
        optimizer, self.schedule = build_optimizer(model, settings)
        groups = mts_fast.training.parameter_groups(selector, settings.selector_weight_decay)
        selector_optimizer = torch.optim.AdamW(groups, lr=settings.selector_lr)
        warmup = round(settings.warmup_share * settings.steps)
        self.step = mts_fast.MTSStep(
            model,
            optimizer,
            selector,
            selector_optimizer,
            engine=settings.engine,
            hypergradient_lr=settings.hypergradient_lr,
            online_features=online,
            online_momentum=settings.online_momentum,
            selector_every=settings.selector_every,
            warmup_steps=warmup,
            selector_scheduler=mts_fast.training.warmup_cosine(
                selector_optimizer, warmup, settings.steps + 1
            ),
        )

    @classmethod
    def with_features(
        cls,
        scenario: Scenario,
        table: FeatureTable,
        settings: Settings,
        seed: int,
        *,
        track_gsnr: bool = False,
    ) -> MTSRun:
        """MTS with the full feature set."""
        offline = table.standardized(PAPER_COLUMNS)  # [N, 13]
        torch.manual_seed(seed)
        selector = mts_fast.Selector(ONLINE_WIDTH + offline.shape[1], CLASSES)
        return cls(
            scenario,
            settings,
            seed,
            selector,
            lambda _, indices: offline[indices],
            online=True,
            track_gsnr=track_gsnr,
        )

    @classmethod
    def loss_only(cls, scenario: Scenario, settings: Settings, seed: int) -> MTSRun:
        """A selector that sees nothing but the sample's current loss (Meta-Weight-Net)."""

        def current_loss(model: nn.Module, indices: Tensor) -> Tensor:
            batch = scenario.pool[indices]
            with torch.no_grad():
                return F.cross_entropy(model(batch.images), batch.labels, reduction="none")[:, None]

        torch.manual_seed(seed)
        selector = mts_fast.Selector(1, CLASSES, class_embedding=0, group_embedding=0)
        return cls(scenario, settings, seed, selector, current_loss, online=False)

    def take_step(self, indices: Tensor) -> mts_fast.StepResult:
        """One step on these pool samples [B]."""
        batch, val = self.scenario.pool[indices], self.scenario.val
        return self.step(
            batch.images,
            batch.labels,
            features=self.features(self.step.model, indices),
            is_synthetic=self.scenario.is_synthetic[indices],
            val_inputs=val.images,
            val_labels=val.labels,
        )

    def train(self, progress: Progress, *, stop: int | None = None) -> Selection:
        """Train to the end, or for `stop` steps, and weigh the whole pool."""
        steps = batches(len(self.scenario.pool), self.settings, self.generator)
        every = max(1, self.settings.steps // CURVE_POINTS)
        # single selectors are noisy: the weights are averaged over the second half of training
        half = self.settings.steps // 2
        apart = max(1, half // AVERAGED)
        history, weights = [], []
        for count, indices in enumerate(islice(steps, stop)):
            sampled = count % every == 0
            self.step.track_gsnr = sampled and self.track_gsnr
            result = self.take_step(indices)
            self.schedule.step()
            if sampled:
                history.append(result)
            if count >= half and (count - half) % apart == 0:
                weights.append(self.pool_weights())
            progress(1)
        weights.append(self.pool_weights())
        average = torch.stack(weights).mean(0)
        return Selection(self.step.model.eval(), average, weights[-1], _curves(history, every))

    def pool_weights(self) -> Tensor:
        """Weights [N] of the whole pool under the current selector."""
        scenario = self.scenario
        parts = []
        for i in torch.arange(len(scenario.pool)).split(WEIGHING_BATCH):
            batch = scenario.pool[i]
            parts.append(
                self.step.weights(
                    batch.images,
                    batch.labels,
                    features=self.features(self.step.model, i),
                    is_synthetic=scenario.is_synthetic[i],
                    val_inputs=scenario.val.images,
                )
            )
        return torch.cat(parts)


def retrain(
    scenario: Scenario, weights: Tensor, settings: Settings, seed: int, progress: Progress
) -> nn.Module:
    """Fresh training on everything, validation set included, with the learned weights frozen.

    A validation image counts as much as the average real image of the pool.
    """
    real = weights[~scenario.is_synthetic].mean()
    both: LabelledImages = scenario.pool + scenario.val
    frozen = torch.cat([weights, real.expand(len(scenario.val))])
    return train_weighted(both, settings, seed, progress, weights=frozen)


def _curves(history: list[mts_fast.StepResult], every: int) -> dict[str, list[float]]:
    """Curves of the paper's Figure 2, read from the results after training."""
    curves: dict[str, list[float]] = {"step": [float(i * every) for i in range(len(history))]}
    for result in history:
        for name, value in result.statistics.read().items():
            curves.setdefault(name, []).append(value)
        if result.val_loss is not None:
            curves.setdefault("val_loss", []).append(float(result.val_loss))
        if result.gsnr is not None:
            curves.setdefault("gsnr", []).append(float(result.gsnr))
    return curves
