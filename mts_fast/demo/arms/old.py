"""All arms of the comparison for one seed: what each was trained on, its accuracy, its weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mts_fast.demo.classifiers import SETTINGS, Settings, accuracy, train_weighted
from mts_fast.demo.scenario import GOOD, Scenario, make_scenario
from mts_fast.demo.selection import MTSRun, Selection, pool_features, retrain
from mts_fast.features import ForgettingCounter

# in the order of the table
ARMS = (
    "real only",
    "real + validation",
    "all, unweighted",
    "all, random weights",
    "loss-only selector",
    "MTS",
    "MTS weights, retrained",
    "oracle: real + good synthetic",
)

Report = Callable[[str, int], None]  # arm, steps taken


@dataclass
class SeedResult:
    """Outcome of one seed: by arm, accuracy in [0, 1], AUC of the weights and seconds."""

    seed: int
    accuracy: dict[str, float] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)  # of the pool, by MTS


def run_seed(
    data: str, seed: int, root: str | None, settings: Settings | None, report: Report
) -> SeedResult:
    """Train every arm on the scenario of this seed."""
    settings = settings or SETTINGS[data]
    scenario = make_scenario(data, seed, root)
    result = SeedResult(seed)

    def record(arm: str, train: Callable[[Callable[[int], None]], nn.Module]) -> nn.Module:
        start = time.perf_counter()
        model = train(lambda steps: report(arm, steps))
        result.seconds[arm] = time.perf_counter() - start
        result.accuracy[arm] = accuracy(model, scenario.test)
        return model

    pool = scenario.pool
    plain = {
        "real only": scenario.real,
        "real + validation": scenario.real + scenario.val,
        "oracle: real + good synthetic": pool[(scenario.kind == GOOD) | ~scenario.is_synthetic],
    }
    for arm, images in plain.items():
        record(arm, partial(train_weighted, images, settings, seed))
    counter = ForgettingCounter(len(pool))
    unselected = record(
        "all, unweighted", lambda p: train_weighted(pool, settings, seed, p, counter=counter)
    )
    draw = torch.rand(len(pool), generator=torch.Generator().manual_seed(seed))
    record("all, random weights", lambda p: train_weighted(pool, settings, seed, p, weights=draw))
    result.auc["all, random weights"] = selection_auc(scenario, draw)

    def learn(arm: str, run: MTSRun) -> Selection:
        start = time.perf_counter()
        outcome = run.train(lambda steps: report(arm, steps))
        result.seconds[arm] = time.perf_counter() - start
        result.accuracy[arm] = accuracy(outcome.model, scenario.test)
        result.auc[arm] = selection_auc(scenario, outcome.weights)
        return outcome

    learn("loss-only selector", MTSRun.loss_only(scenario, settings, seed))
    start = time.perf_counter()
    table = pool_features(scenario, unselected, counter)
    feature_seconds = time.perf_counter() - start
    run = MTSRun.with_features(scenario, table, settings, seed, track_gsnr=True)
    selection = learn("MTS", run)
    result.seconds["MTS"] += feature_seconds
    result.curves = selection.curves
    result.weights = selection.weights.tolist()
    weights = selection.weights
    record("MTS weights, retrained", lambda p: retrain(scenario, weights, settings, seed, p))
    return result


def selection_auc(scenario: Scenario, weights: Tensor) -> float:
    """Area under the ROC curve of the weights, good against bad synthetic samples."""
    from sklearn.metrics import roc_auc_score

    synthetic = scenario.is_synthetic
    return float(roc_auc_score(scenario.kind[synthetic] == GOOD, weights[synthetic]))
