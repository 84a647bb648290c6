"""What all arms of one seed share: the scenario, the budget, and classifiers that many look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast.demo.data import Scenario
from mts_fast.demo.training import (
    Settings,
    Watch,
    epochs,
    label_probability,
    train_classifier,
)
from mts_fast.features import ForgettingCounter
from mts_fast.selection import MixedBatchSampler

# hyper-parameters of one arm, chosen on tuning seeds
Options = Mapping[str, Any]


@dataclass
class Outcome:
    """What an arm made: a classifier, weights [N] of the pool where it has any, and curves."""

    model: nn.Module
    weights: Tensor | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)


class SeedRun:
    """One seed of one scenario; every training takes `settings.steps` steps."""

    def __init__(self, scenario: Scenario, settings: Settings, seed: int) -> None:
        self.scenario = scenario
        self.settings = settings
        self.seed = seed
        # outcomes of learned selectors, by everything that they depend on
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}

    def with_options(self, options: Options) -> Settings:
        """The settings, with those that an arm has of its own."""
        names = {"lr", "weight_decay"} & options.keys()
        return replace(self.settings, **{name: options[name] for name in names})

    def alike(self, options: Options, watch: Watch | None = None) -> nn.Module:
        """A classifier trained on the whole pool alike."""
        settings = self.with_options(options)
        generator = torch.Generator().manual_seed(self.seed)
        batches = epochs(len(self.scenario.pool), settings, generator)
        return train_classifier(self.scenario.pool, batches, settings, self.seed, watch=watch)

    def mixed(self, weights: Tensor, options: Options, model: nn.Module | None = None) -> nn.Module:
        """The recipe for weights: a share of every batch is clean, the rest is drawn by weight."""
        settings = self.with_options(options)
        scenario = self.scenario
        weights = weights * scenario.candidates
        sampler = MixedBatchSampler(
            weights ** options.get("power", 1),
            len(scenario.clean),
            settings.batch_size,
            num_batches=settings.steps,
            clean_share=options.get("clean_share", 0.5),
            labels=scenario.pool.labels if options.get("balanced", False) else None,
            seed=self.seed,
        )
        batches = map(torch.tensor, sampler)
        both = scenario.pool + scenario.clean
        return train_classifier(both, batches, settings, self.seed, model=model)

    def real_and_clean(self, options: Options) -> nn.Module:
        """A classifier trained on real and validation data; on the clean data alone where those
        hold the real ones."""
        real = ~self.scenario.is_synthetic
        if not (real & self.scenario.candidates).any():
            return self.clean_alone(options)
        return self.mixed(real.float(), options)

    def clean_alone(self, options: Options, model: nn.Module | None = None) -> nn.Module:
        """A classifier trained on the clean data alone."""
        ones = torch.ones(len(self.scenario.pool))
        return self.mixed(ones, {**options, "clean_share": 1.0}, model)

    @cached_property
    def everything(self) -> nn.Module:
        """Trained on the pool alike; its forgetting events are in `forgetting`."""
        counter = self.forgetting
        labels = self.scenario.pool.labels

        def count(indices: Tensor, logits: Tensor) -> None:
            counter.update(indices, logits.argmax(1) == labels[indices])

        return self.alike({}, count)

    @cached_property
    def forgetting(self) -> ForgettingCounter:
        """Counter of `everything`."""
        return ForgettingCounter(len(self.scenario.pool))

    @cached_property
    def by_validation(self) -> nn.Module:
        """Trained on the validation data alone."""
        return self.clean_alone({})

    @cached_property
    def by_real(self) -> nn.Module:
        """Trained on real and validation data, half each."""
        return self.real_and_clean({})

    def once(self, key: tuple[Any, ...], train: Callable[[], Outcome]) -> Outcome:
        """The outcome of `train`, which several arms look at."""
        if key not in self._outcomes:
            self._outcomes[key] = train()
        return self._outcomes[key]

    def probability(self, model: nn.Module) -> Tensor:
        """[N]: the probability of each pool sample's label under a classifier."""
        return label_probability(model, self.scenario.pool)


Train = Callable[[SeedRun, Options], Outcome]
