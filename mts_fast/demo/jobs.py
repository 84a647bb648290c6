"""One seed of one variant of the comparison: every arm trained, and what came of it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mts_fast.demo.arms import ARMS
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import make_scenario
from mts_fast.demo.options import options_of
from mts_fast.demo.training import SETTINGS, accuracy, worst_group

Report = Callable[[str], None]  # called with an arm when it starts


@dataclass(frozen=True)
class Job:
    """What to train: arms on a scenario, with changes that make a variant."""

    data: str
    seed: int
    arms: tuple[str, ...]
    variant: str = ""
    root: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    scenario: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its file and in messages."""
        return f"{self.variant} seed {self.seed}".strip()


@dataclass
class JobResult:
    """By arm: accuracy and that of the worst group in [0, 1], AUC of the weights, seconds."""

    seed: int
    variant: str = ""
    accuracy: dict[str, float] = field(default_factory=dict)
    worst_group: dict[str, float] = field(default_factory=dict)
    auc: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)  # of MTS itself
    weights: list[float] = field(default_factory=list)  # of the pool, by MTS


def available_arms(data: str) -> tuple[str, ...]:
    """Arms that this scenario and the installed packages allow, in the order of the table."""
    coloured = data.startswith("coloured")
    return tuple(
        name
        for name, arm in ARMS.items()
        if (coloured or not arm.needs_bias) and name not in missing_packages()
    )


def missing_packages() -> dict[str, str]:
    """Arms that are left out here, and the package that each needs."""
    return {
        name: arm.needs_package
        for name, arm in ARMS.items()
        if arm.needs_package and not importlib.util.find_spec(arm.needs_package)
    }


def train_job(job: Job, report: Report) -> JobResult:
    """Train all arms of a job; what several arms need is trained once, by the first of them."""
    settings = replace(SETTINGS[job.data], **job.settings)
    scenario = make_scenario(job.data, job.seed, job.root, job.scenario)
    run = SeedRun(scenario, settings, job.seed)
    result = JobResult(job.seed, job.variant)
    for name in job.arms:
        report(name)
        start = time.perf_counter()
        outcome = ARMS[name].train(run, {**options_of(job.data, name), **job.options})
        result.seconds[name] = time.perf_counter() - start
        result.accuracy[name] = accuracy(outcome.model, scenario.test)
        worst = worst_group(outcome.model, scenario.test, scenario.test_groups)
        if worst is not None:
            result.worst_group[name] = worst
        if outcome.weights is not None:
            result.auc[name] = selection_auc(
                scenario.is_helpful, scenario.is_synthetic, outcome.weights
            )
        if name == "MTS itself":
            assert outcome.weights is not None
            result.curves = outcome.curves
            result.weights = [round(w, 4) for w in outcome.weights.tolist()]
    return result


def selection_auc(
    is_helpful: torch.Tensor, is_synthetic: torch.Tensor, weights: torch.Tensor
) -> float:
    """Area under the ROC curve of the weights, helpful against other synthetic samples."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_helpful[is_synthetic], weights[is_synthetic]))
