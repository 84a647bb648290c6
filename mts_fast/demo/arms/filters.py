"""Arms that weigh samples by classifiers, without meta-learning: what a careful user would try."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mts_fast.demo.arms.seed_run import Options, Outcome, SeedRun
from mts_fast.demo.training import logits_of
from mts_fast.selection import discount_learned


def _retrained(run: SeedRun, weights: Tensor, options: Options) -> Outcome:
    return Outcome(run.mixed(weights, options), weights)


def _filtered(run: SeedRun, model: nn.Module, options: Options) -> Outcome:
    """By the probability of the label to a power; power 0: 1 where the model takes that class."""
    if options.get("power", 1) > 0:
        return _retrained(run, run.probability(model), options)
    guesses = logits_of(model, run.scenario.pool).argmax(1)
    return _retrained(run, (guesses == run.scenario.pool.labels).float(), {**options, "power": 1})


def filter_by_validation(run: SeedRun, options: Options) -> Outcome:
    """Probability of the label under a classifier of the clean data: the validation data, and with
    planted failures the real ones."""
    return _filtered(run, run.by_validation, options)


def filter_by_real(run: SeedRun, options: Options) -> Outcome:
    """The same under a classifier of real and validation data."""
    return _filtered(run, run.by_real, options)


def filter_twice(run: SeedRun, options: Options) -> Outcome:
    """The classifier that the filter yields filters once more."""
    first = filter_by_validation(run, options).model
    return _filtered(run, first, options)


def small_loss(run: SeedRun, options: Options) -> Outcome:
    """The share of the pool with the least loss under the classifier of everything."""
    probability = run.probability(run.everything)
    bound = probability.quantile(1 - options.get("keep", 0.7))
    return _retrained(run, (probability >= bound).float(), options)


def reducible_holdout_loss(run: SeedRun, options: Options) -> Outcome:
    """RHO (Mindermann et al. 2022), offline: loss under the trained classifier of everything, in
    place of the current one, minus loss under clean data."""
    holdout = run.by_real if options.get("holdout", "real") == "real" else run.by_validation
    gap = run.probability(holdout).clamp(min=1e-8).log()
    gap = gap - run.probability(run.everything).clamp(min=1e-8).log()
    return _retrained(run, torch.sigmoid(options.get("scale", 1.0) * gap), options)


def clean_but_not_easy(run: SeedRun, options: Options) -> Outcome:
    """Likely under the clean classifier, unlikely under the one of everything; with `refinements`
    what MTS's weights are refined by, from a classifier of the validation data instead."""
    weights = run.probability(run.by_validation) ** options.get("power", 1)
    return refined(run, weights, {"easy_power": 1, **options})


def refined(run: SeedRun, weights: Tensor, options: Options) -> Outcome:
    """A classifier by these weights [N], samples discounted that the one of everything has learned.

    Each of `refinements` takes the root of the label's probability under the last classifier as
    weights and trains a new one. The root keeps what is hard and right, which the product with the
    weights before would lose.
    """
    easy = run.probability(run.everything)

    def discounted(values: Tensor) -> Tensor:
        return discount_learned(values, easy, options.get("easy_power", 0))

    mixing = {**options, "power": 1}
    weights = discounted(weights)
    outcome = _retrained(run, weights, mixing)
    for _ in range(options.get("refinements", 0)):
        outcome = _retrained(run, discounted(run.probability(outcome.model).sqrt()), mixing)
    return outcome


def just_train_twice(run: SeedRun, options: Options) -> Outcome:
    """Samples that a first training gets wrong count more (Liu et al. 2021); it is not stopped
    early, which was no better on tuning seeds."""
    guesses = logits_of(run.everything, run.scenario.pool).argmax(1)
    wrong = guesses != run.scenario.pool.labels
    return _retrained(run, 1 + (options.get("factor", 10.0) - 1) * wrong.float(), options)


def confident_learning(run: SeedRun, options: Options) -> Outcome:
    """Label issues by cleanlab (Northcutt et al. 2021) left out; probabilities of the classifier of
    the validation data, which the pool was not part of."""
    from cleanlab.filter import find_label_issues

    probabilities = logits_of(run.by_validation, run.scenario.pool).softmax(1).double().numpy()
    issues = find_label_issues(
        run.scenario.pool.labels.numpy(),
        probabilities,
        filter_by=options.get("filter_by", "prune_by_noise_rate"),
        n_jobs=1,
    )
    return _retrained(run, torch.from_numpy(~issues).float(), options)
