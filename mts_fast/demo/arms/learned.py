"""The learned selectors of the demo: MTS with full features, and one that sees only the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mts_fast
from mts_fast.demo.arms.filters import refined
from mts_fast.demo.arms.plain import retrain_last_layer
from mts_fast.demo.arms.seed_run import Options, Outcome, SeedRun
from mts_fast.demo.data import CLASSES, REAL
from mts_fast.demo.training import build_classifier, build_optimizer, epochs
from mts_fast.features import PAPER_COLUMNS, FeatureTable

ONLINE_WIDTH = 4
WEIGHING_BATCH = 1024
# times in a run at which the whole pool is weighed; the weights of the second half are averaged,
# since those of a single selector are noisy
WEIGHINGS = 40
# points stored of each curve
CURVE_POINTS = 120
SELECTOR_OPTIONS = ("selector_lr", "batch_size", "steps")
RATE_OPTIONS = ("lr", "weight_decay")
FEATURE_OPTIONS = ("embeddings", "features")

# features [B, F] of pool samples under the current classifier
BatchFeatures = Callable[[nn.Module, Tensor], Tensor]


def mts(run: SeedRun, options: Options) -> Outcome:
    """MTS itself: the classifier that was trained while the weights were learned."""

    def train() -> Outcome:
        if options.get("features") == "loss":
            return MTSRun.loss_only(run, options, track_gsnr=True).train()
        columns = pool_features(run, options)
        return MTSRun.with_features(run, columns, options, track_gsnr=True).train()

    names = (*SELECTOR_OPTIONS, *FEATURE_OPTIONS, *RATE_OPTIONS)
    return run.once(("MTS", *(options.get(name) for name in names)), train)


def mts_weights(run: SeedRun, options: Options) -> Outcome:
    """The recipe: a new classifier on a clean share and samples drawn by the weights of MTS, those
    discounted that the classifier of everything has learned; then refined."""
    weights = mts(run, options).weights
    assert weights is not None
    key = ("MTS weights", *sorted(options.items()))
    return run.once(key, lambda: refined(run, weights, options))


def mts_last_layer(run: SeedRun, options: Options) -> Outcome:
    """The same, its last layer retrained on the clean data."""
    learned = mts_weights(run, options)
    return Outcome(retrain_last_layer(run, learned.model, {}), learned.weights)


def loss_only(run: SeedRun, options: Options) -> Outcome:
    """Meta-Weight-Net (Shu et al. 2019): a selector that sees the loss; its weights, retrained."""
    key = ("loss only", *(options.get(name) for name in (*SELECTOR_OPTIONS, *RATE_OPTIONS)))
    learned = run.once(key, lambda: MTSRun.loss_only(run, options).train())
    assert learned.weights is not None
    return Outcome(run.mixed(learned.weights, options), learned.weights)


def embeddings_of(run: SeedRun, source: str) -> Tensor:
    """[N, D] of the pool: its pixels, or the hidden layer of a classifier of clean data."""
    images = run.scenario.pool.images
    if source == "pixels":
        return images.flatten(1)
    model = run.by_validation if source == "validation" else run.by_real
    with torch.no_grad():
        return model[:-1](images)  # type: ignore[index]


def pool_features(run: SeedRun, options: Options) -> Tensor:
    """Standardised columns [N, F] of the pool, by `options["features"]`.

    "paper": its 13 offline columns, default; "all": with the loss under the classifier of the
    validation data, and what that of everything reduces it by; "distribution", "dynamics": those of
    the paper's 13 that are of this kind; "online": none.
    """
    images, labels = run.scenario.pool.images, run.scenario.pool.labels
    kind = options.get("features", "paper")
    if kind == "online":
        return images.new_empty(len(labels), 0)
    embeddings = embeddings_of(run, options.get("embeddings", "validation"))
    distribution = FeatureTable(
        mts_fast.features.distribution_features(embeddings, labels, run.scenario.is_synthetic)
    )
    dynamics = FeatureTable(mts_fast.features.training_dynamics(run.everything, images, labels))
    dynamics.update(run.forgetting.columns())
    for part, table in (("distribution", distribution), ("dynamics", dynamics)):
        if kind == part:
            return table.standardized([name for name in PAPER_COLUMNS if name in table])
    columns = [FeatureTable({**distribution, **dynamics}).standardized(PAPER_COLUMNS)]
    if kind == "all":
        clean = run.probability(run.by_validation).clamp(min=1e-8).log()
        gap = clean - run.probability(run.everything).clamp(min=1e-8).log()
        extra = torch.stack([clean, gap], 1)
        columns.append((extra - extra.mean(0)) / extra.std(0))
    return torch.cat(columns, 1)


class MTSRun:
    """One run of MTSStep: the selector, the classifier and their schedules."""

    def __init__(
        self,
        run: SeedRun,
        selector: nn.Module,
        features: BatchFeatures,
        options: Options,
        *,
        online: bool,
        track_gsnr: bool = False,
    ) -> None:
        changed = {name: options[name] for name in SELECTOR_OPTIONS if name in options}
        self.settings = settings = replace(run.with_options(options), **changed)
        self.scenario = run.scenario
        self.features = features
        self.track_gsnr = track_gsnr
        self.generator = torch.Generator().manual_seed(run.seed)
        torch.manual_seed(run.seed)
        model = build_classifier(settings.data)
        optimizer, self.schedule = build_optimizer(model.parameters(), settings)
        groups = mts_fast.training.parameter_groups(selector, settings.selector_weight_decay)
        selector_optimizer = torch.optim.AdamW(groups, lr=settings.selector_lr)
        warmup = round(settings.warmup_share * settings.steps)
        self.step = mts_fast.MTSStep(
            model,
            optimizer,
            selector,
            selector_optimizer,
            engine=settings.engine,
            compute=settings.compute,
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
        cls, run: SeedRun, offline: Tensor, options: Options, *, track_gsnr: bool = False
    ) -> MTSRun:
        """MTS with offline columns [N, F] and the online ones."""
        torch.manual_seed(run.seed)
        selector = mts_fast.Selector(ONLINE_WIDTH + offline.shape[1], CLASSES)
        return cls(
            run,
            selector,
            lambda _, indices: offline[indices],
            options,
            online=True,
            track_gsnr=track_gsnr,
        )

    @classmethod
    def loss_only(cls, run: SeedRun, options: Options, *, track_gsnr: bool = False) -> MTSRun:
        """A selector that sees nothing but the sample's current loss (Meta-Weight-Net)."""

        def current_loss(model: nn.Module, indices: Tensor) -> Tensor:
            batch = run.scenario.pool[indices]
            with torch.no_grad():
                return F.cross_entropy(model(batch.images), batch.labels, reduction="none")[:, None]

        torch.manual_seed(run.seed)
        selector = mts_fast.Selector(1, CLASSES, class_embedding=0, group_embedding=0)
        return cls(run, selector, current_loss, options, online=False, track_gsnr=track_gsnr)

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

    def train(self) -> Outcome:
        """Train to the end, and weigh the whole pool now and then."""
        steps = epochs(len(self.scenario.pool), self.settings, self.generator)
        every = max(1, self.settings.steps // CURVE_POINTS)
        apart = max(1, self.settings.steps // WEIGHINGS)
        history: list[mts_fast.StepResult] = []
        weights: dict[int, Tensor] = {}
        for count, indices in enumerate(steps):
            sampled = count % every == 0
            self.step.track_gsnr = sampled and self.track_gsnr
            result = self.take_step(indices)
            self.schedule.step()
            if sampled:
                history.append(result)
            if (count + 1) % apart == 0 or count + 1 == self.settings.steps:
                weights[count + 1] = self.pool_weights()
        half = self.settings.steps // 2
        average = torch.stack([w for at, w in weights.items() if at > half]).mean(0)
        curves = _curves(history, every) | self._weights_by_kind(weights)
        return Outcome(self.step.model.eval(), average, curves)

    def _weights_by_kind(self, weights: dict[int, Tensor]) -> dict[str, list[float]]:
        """Mean weight of every kind at the times of the weighings."""
        kinds = {"real": REAL, **{name: i for i, name in enumerate(self.scenario.kinds)}}
        curves = {
            f"weight: {name}": [
                float(w[self.scenario.kind == kind].mean()) for w in weights.values()
            ]
            for name, kind in kinds.items()
        }
        return {"weighed at": [float(at) for at in weights], **curves}

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


def _curves(history: list[mts_fast.StepResult], every: int) -> dict[str, list[float]]:
    """Curves of the paper's Figure 2, read from the results after training."""
    curves: dict[str, list[float]] = {"step": [float(i * every) for i in range(len(history))]}
    for result in history:
        everything = {"computed": float(len(result.losses))}  # unless the step says less
        for name, value in (everything | result.statistics.read()).items():
            curves.setdefault(name, []).append(value)
        if result.val_loss is not None:
            curves.setdefault("val_loss", []).append(float(result.val_loss))
        if result.gsnr is not None:
            curves.setdefault("gsnr", []).append(float(result.gsnr))
    return curves
