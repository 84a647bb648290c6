"""Arms that weigh samples by classifiers, without meta-learning: what a careful user would try."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mts_fast.demo.arms.seed_run import Options, Outcome, SeedRun
from mts_fast.demo.training import logits_of
from mts_fast.selection import discount_learned


def _retrained(run: SeedRun, weights: Tensor, options: Options) -> Outcome:
    return Outcome(run.mixed(weights, options), weights)


def _soft_or_hard(run: SeedRun, model: nn.Module, options: Options) -> Tensor:
    """Probability of the label, or 1 where it is the class that the model takes."""
    if options.get("hard", False):
        guesses = logits_of(model, run.scenario.pool).argmax(1)
        return (guesses == run.scenario.pool.labels).float()
    return run.probability(model)


def filter_by_validation(run: SeedRun, options: Options) -> Outcome:
    """Probability of the label under a classifier of the validation data."""
    return _retrained(run, _soft_or_hard(run, run.by_validation, options), options)


def filter_by_real(run: SeedRun, options: Options) -> Outcome:
    """The same under a classifier of real and validation data."""
    return _retrained(run, _soft_or_hard(run, run.by_real, options), options)


def filter_twice(run: SeedRun, options: Options) -> Outcome:
    """The classifier that the filter yields filters once more."""
    first = filter_by_validation(run, options).model
    return _retrained(run, _soft_or_hard(run, first, options), options)


def small_loss(run: SeedRun, options: Options) -> Outcome:
    """The share of the pool with the least loss under the classifier of everything."""
    probability = run.probability(run.everything)
    bound = probability.quantile(1 - options.get("keep", 0.7))
    return _retrained(run, (probability >= bound).float(), options)


def reducible_holdout_loss(run: SeedRun, options: Options) -> Outcome:
    """RHO (Mindermann et al. 2022): loss under everything minus loss under clean data."""
    holdout = run.by_real if options.get("holdout", "real") == "real" else run.by_validation
    gap = run.probability(holdout).clamp(min=1e-8).log()
    gap = gap - run.probability(run.everything).clamp(min=1e-8).log()
    return _retrained(run, torch.sigmoid(options.get("scale", 1.0) * gap), options)


def clean_but_not_easy(run: SeedRun, options: Options) -> Outcome:
    """Likely under the clean classifier, unlikely under the one of everything."""
    easy = run.probability(run.everything)
    weights = run.probability(run.by_validation) ** options.get("power", 1)
    weights = discount_learned(weights, easy, options.get("easy_power", 1))
    return _retrained(run, weights, {**options, "power": 1})


def just_train_twice(run: SeedRun, options: Options) -> Outcome:
    """Samples that a short training gets wrong count more (Liu et al. 2021)."""
    share = options.get("identification", 1.0)
    first = run.everything if share == 1 else run.alike({**options, "share": share})
    guesses = logits_of(first, run.scenario.pool).argmax(1)
    wrong = guesses != run.scenario.pool.labels
    return _retrained(run, 1 + (options.get("factor", 10.0) - 1) * wrong.float(), options)


def confident_learning(run: SeedRun, options: Options) -> Outcome:
    """Label quality by cleanlab (Northcutt et al. 2021), probabilities of the clean classifier."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    clean = run.by_real if options.get("holdout", "validation") == "real" else run.by_validation
    probabilities = logits_of(clean, run.scenario.pool).softmax(1).double().numpy()
    labels = run.scenario.pool.labels.numpy()
    if options.get("hard", True):
        issues = find_label_issues(labels, probabilities, n_jobs=1)
        weights = torch.from_numpy(~issues).float()
    else:
        weights = torch.from_numpy(get_label_quality_scores(labels, probabilities)).float()
    return _retrained(run, weights, options)
