"""Ranks that take a step together give what one process gives on their joined batch."""

import pytest
from rank_comparison import ENGINES, assert_equals_one_process
from rank_jobs import nothing_counts
from rank_pool import SLOW


@pytest.mark.parametrize(
    "wrapped",
    [
        {"gradient_as_bucket_view": True},
        pytest.param({}, marks=SLOW),
        pytest.param(None, marks=SLOW),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine(ranks, engine, size, wrapped):
    near = {"rtol": 1e-4, "atol": 1e-6} if engine == "finite_difference" else {}
    assert_equals_one_process(ranks, size, {"engine": engine, "wrapped": wrapped}, **near)


OPTIONS = [
    {"schedule": "reuse", "optimizer": "adamw"},
    {"micro_batch": 2, "online_momentum": 0.9},
    {"selector_batch": True},
    {"val_objective": "group_balanced", "val_weights": True},
    {"max_grad_norm": 0.05, "clip_virtual_step": True, "optimizer": "adamw"},
    {"model": "unused", "wrapped": {"find_unused_parameters": True}},
]
MORE_OPTIONS = [
    {"schedule": "reuse", "online": False},
    {"optimizer": "adamw", "class_weight": True, "memory": "low"},
    {"selector_batch": True, "engine": "double_backward", "online": False},
    {"val_objective": "worst_group", "micro_batch": 2},
    {"val_weights": True, "validation_mode": "train"},
    {"selector_every": 3, "warmup_steps": 2, "max_grad_norm": 0.5},
    {"track_gsnr": True},
    {"model": "norm"},
    {"wrapped": {"static_graph": True}},
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, *(pytest.param(o, marks=SLOW) for o in MORE_OPTIONS)], ids=str
)
def test_every_option(ranks, options):
    assert_equals_one_process(ranks, 2, options)


@pytest.mark.parametrize("options", [{}, {"model": "unused", "selector_batch": True}], ids=str)
def test_decisions_by_hosts(ranks, options):
    """On a GPU what is decided does not travel with the data."""
    options = options | {"by_hosts": True}
    assert_equals_one_process(ranks, 4, options, (6, 0, 3, 3), (5, 0, 0, 3))


@pytest.mark.parametrize(
    ("sizes", "val_sizes"),
    [
        ((6, 0, 3, 3), (5, 0, 0, 3)),
        pytest.param((7, 2, 1, 2), (2, 2, 2, 3), marks=SLOW),
        pytest.param((5, 4, 0, 3), (0, 4, 2, 1), marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"selector_batch": True}, {"val_objective": "worst_group"}]
)
def test_uneven_and_empty_shards(ranks, sizes, val_sizes, options):
    assert_equals_one_process(ranks, 4, options, sizes, val_sizes)


SILENT = {
    "val_weights": {"val_weights": True},
    "val_labels": {"val_objective": "group_balanced"},
    "labels": {"class_weight": True, "engine": "double_backward"},
}


@pytest.mark.parametrize("silent", SILENT)
def test_a_part_that_counts_nothing(ranks, silent):
    """Weights of 0, or labels that are ignored, for all samples of one rank."""
    several, _ = assert_equals_one_process(ranks, 2, SILENT[silent] | {"silent": silent})
    if silent == "labels":  # sizes are alike, so rank 0 has that part in every call
        assert not several[0]["results"][0]["weights"].any()


@pytest.mark.parametrize("by_hosts", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_weights": True}, "val_weights must be 0 or more, and positive somewhere"),
        ({}, "val_labels must be classes that count something"),
    ],
    ids=["val_weights", "val_labels"],
)
def test_a_validation_batch_that_counts_nothing_is_refused(ranks, options, message, by_hosts):
    for text, state in ranks.results(nothing_counts, 2, options | {"by_hosts": by_hosts}):
        assert message in text, text
        assert state == 0
