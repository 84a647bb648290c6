"""Every arm of the comparison, on few steps; what the arms that weigh samples weigh by."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from mts_fast.demo.arms import ARMS
from mts_fast.demo.arms.filters import refined
from mts_fast.demo.arms.learned import pool_features
from mts_fast.demo.arms.plain import retrain_last_layer
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import DATA as DATA_SETS
from mts_fast.demo.data import make_scenario
from mts_fast.demo.jobs import Job, available_arms, selection_auc, train_job
from mts_fast.demo.options import OPTIONS, options_of
from mts_fast.demo.training import SETTINGS, accuracy, logits_of, worst_group

DATA = "coloured-digits"
STEPS = 20


@pytest.fixture(scope="module")
def run():
    settings = replace(SETTINGS[DATA], steps=STEPS)
    return SeedRun(make_scenario(DATA, 3), settings, 3)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_a_classifier(name, run):
    if ARMS[name].needs_package and not importlib.util.find_spec(ARMS[name].needs_package):
        pytest.skip(f"needs {ARMS[name].needs_package}")
    outcome = ARMS[name].train(run, {})
    assert not outcome.model.training
    other = SeedRun(run.scenario, run.settings, 3)
    again = ARMS[name].train(other, {})
    for p, q in zip(outcome.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    if outcome.weights is not None:
        size = len(run.scenario.pool)
        assert outcome.weights.shape == (size,) and (outcome.weights >= 0).all()


@pytest.mark.parametrize("data", ["coloured-digits", "digits"])
def test_a_job_reports_every_arm(data):
    arms = available_arms(data)
    assert ("group DRO, true groups" in arms) == data.startswith("coloured")
    seen = []
    result = train_job(Job(data, 3, arms, settings={"steps": 2}), seen.append)
    assert tuple(seen) == tuple(result.accuracy) == tuple(result.seconds) == arms
    assert (set(result.worst_group) == {*arms}) == data.startswith("coloured")
    assert len(result.weights) == (4200 if data.startswith("coloured") else 4100)
    assert {"gsnr", "mean_weight", "weighed at", "weight: real"} <= result.curves.keys()


def test_the_oracle_is_ahead_of_everything_alike(run):
    settings = replace(run.settings, steps=200)
    longer = SeedRun(run.scenario, settings, 3)
    oracle, alike = (
        accuracy(ARMS[name].train(longer, {}).model, run.scenario.test)
        for name in ("oracle", "everything alike")
    )
    assert oracle > alike + 0.2


def test_the_last_layer_alone_is_retrained(run):
    model = run.everything
    retrained = retrain_last_layer(run, model, {})
    before, after = list(model.parameters()), list(retrained.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before[:-2], after[:-2], strict=True))
    assert not torch.equal(before[-2], after[-2])
    assert all(p.requires_grad for p in before)


def test_weights_are_what_the_arms_say(run):
    """Every filter by hand, from the probabilities of the classifiers that it asks."""
    everything, clean = run.probability(run.everything), run.probability(run.by_validation)
    real = run.probability(run.by_real)
    pool = run.scenario.pool
    wrong = logits_of(run.everything, pool).argmax(1) != pool.labels
    predicted = logits_of(run.by_validation, pool).argmax(1) == pool.labels
    first = ARMS["filter by validation"].train(run, {}).model
    for name, options, expected in (
        ("filter by validation", {"power": 2}, clean),
        ("filter by validation", {"power": 0}, predicted.float()),
        ("filter by real + validation", {}, real),
        ("filter twice", {}, run.probability(first)),
        ("just train twice", {"factor": 9}, 1 + 8 * wrong.float()),
        ("reducible holdout loss", {}, torch.sigmoid(real.log() - everything.log())),
        (
            "reducible holdout loss",
            {"holdout": "validation", "scale": 2},
            torch.sigmoid(2 * (clean.log() - everything.log())),
        ),
        ("likely if clean, not easy", {}, clean * (1 - everything)),
        (
            "likely if clean, not easy",
            {"power": 0.5, "easy_power": 2},
            clean.sqrt() * (1 - everything) ** 2,
        ),
        ("oracle", {}, run.scenario.is_helpful.float()),
    ):
        assert torch.allclose(ARMS[name].train(run, options).weights, expected, atol=1e-5), name


def test_small_loss_keeps_the_samples_of_least_loss(run):
    weights = ARMS["small loss"].train(run, {"keep": 0.3}).weights
    probability = run.probability(run.everything)
    assert weights.mean().item() == pytest.approx(0.3, abs=0.01)
    assert probability[weights == 1].min() >= probability[weights == 0].max()


def test_confident_learning_leaves_unlikely_labels_out(run):
    pytest.importorskip("cleanlab")
    clean = run.probability(run.by_validation)
    for way in ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning"):
        weights = ARMS["confident learning"].train(run, {"filter_by": way}).weights
        assert clean[weights == 0].mean() < clean[weights == 1].mean()


def test_features_of_the_selector(run):
    widths = {"paper": 13, "all": 15, "distribution": 10, "dynamics": 3, "online": 0}
    for name, width in widths.items():
        assert pool_features(run, {"features": name}).shape == (len(run.scenario.pool), width)


def test_auc_of_the_truth_is_one(run):
    helpful, synthetic = run.scenario.is_helpful, run.scenario.is_synthetic
    assert selection_auc(helpful, synthetic, helpful.float()) == 1.0
    assert selection_auc(helpful, synthetic, 1 - helpful.float()) == 0.0


def test_worst_group_is_the_least_of_the_groups_that_are_large():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.zeros(len(x)).long(), 10).float()

    scenario = make_scenario(DATA, 3)
    images = scenario.test
    # all right, all wrong, and a third whose few images are all wrong
    right, wrong = images.labels == 0, images.labels != 0
    assert worst_group(Constant(), images, wrong.long()) == 0.0
    chosen = torch.cat([right.nonzero().flatten(), wrong.nonzero().flatten()[:3]])
    few, groups = images[chosen], wrong[chosen].long()
    assert worst_group(Constant(), few, groups) == 1.0
    assert worst_group(Constant(), few, groups, least=3) == 0.0
    assert worst_group(Constant(), images, wrong.long(), least=len(images) + 1) is None
    assert worst_group(Constant(), images, None) is None


def test_options_are_of_arms_that_exist():
    assert OPTIONS.keys() == {"coloured-digits", "coloured-fashion", "fashion"}
    for data, options in OPTIONS.items():
        assert data in DATA_SETS and options.keys() <= ARMS.keys()
        assert options_of(data, "MTS weights, last layer on validation") == options["MTS weights"]
    assert options_of("digits", "no such arm") == {}


def test_a_refinement_asks_the_classifier_before_it(run):
    weights = torch.rand(len(run.scenario.pool))
    options = {"easy_power": 2, "clean_share": 0.25}
    easy = 1 - run.probability(run.everything)
    first = refined(run, weights, options)
    assert torch.allclose(first.weights, weights * easy**2)
    second = refined(run, weights, {**options, "refinements": 1})
    expected = run.probability(first.model).sqrt() * easy**2
    assert torch.allclose(second.weights, expected)
    again = run.mixed(expected, {"clean_share": 0.25})
    for p, q in zip(second.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_mts_weights_begin_with_those_of_mts(run):
    outcome = ARMS["MTS weights"].train(run, {})
    assert torch.equal(outcome.weights, ARMS["MTS itself"].train(run, {}).weights)
