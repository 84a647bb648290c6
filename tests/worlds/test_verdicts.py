"""What the search would say of a step that is wrong: a fault put in by hand is found by name."""

import dataclasses
import random

import numpy as np
import pytest
import torch

import mts_fast
from worlds.runner import COMPUTED, REFUSED, TORN, TRACEBACK, WRONG, run
from worlds.shrinking import PLAIN_BATCHES, PLAIN_OPTIMIZER, PLAIN_STEP, shrunk
from worlds.world import World

SELECTOR = {
    "own": False,
    "scheduler": False,
    "optimizer": {
        "kind": "AdamW",
        "lr": 0.02,
        "weight_decay": 0.01,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "amsgrad": False,
    },
}
PLAIN = World(
    seed=3,
    layers=[{"kind": "linear"}, {"kind": "activation", "function": "tanh"}],
    head={"pool": "mean", "kind": "linear", "output": "tensor", "embedding": {}},
    optimizer=PLAIN_OPTIMIZER,
    selector=SELECTOR,
    batches={**PLAIN_BATCHES, "sizes": [6, 6], "validation": 4},
    step=PLAIN_STEP,
    events=["none", "none"],
)
WITH_BATCH_NORM = dataclasses.replace(
    PLAIN, layers=[{"kind": "linear"}, {"kind": "batch_norm", "frozen_statistics": False}]
)


def scaled_dots(step, result):
    return dataclasses.replace(result, dots=result.dots * 1.01)


def other_losses(step, result):
    return dataclasses.replace(result, losses=result.losses.roll(1))


def moved_parameter(step, result):
    next(step.model.parameters()).data[0, 0] += 1e-3


def moved_selector(step, result):
    next(step.selector.parameters()).data[0, 0] += 1e-2


def moved_buffer(step, result):
    next(iter(step.model.buffers())).mul_(1.1)


def other_mode(step, result):
    step.model.head.eval()


def refused_late(step, result):
    raise ValueError("MTSStep: inputs must be good, got bad; pass better ones")


FAULTS = {
    "dots": scaled_dots,
    "losses": other_losses,
    "classifier parameter": moved_parameter,
    "selector parameter": moved_selector,
    "buffer layers.1.module.running_mean": moved_buffer,
    "modes": other_mode,
    "generators (torch)": lambda step, result: torch.rand(1) and None,
    "generators (numpy)": lambda step, result: np.random.rand() and None,
    "generators (python)": lambda step, result: random.random() and None,
    "steps": lambda step, result: setattr(step, "steps", 7),
}


def after_every_step(monkeypatch, fault):
    plain = mts_fast.MTSStep.__call__

    def call(step, *args, **kwargs):
        result = plain(step, *args, **kwargs)
        changed = fault(step, result)
        return result if changed is None else changed

    monkeypatch.setattr(mts_fast.MTSStep, "__call__", call)


def test_a_right_step_is_computed():
    assert [run(w).verdict for w in (PLAIN, WITH_BATCH_NORM)] == [COMPUTED] * 2


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name, precision, monkeypatch):
    world = WITH_BATCH_NORM if name.startswith("buffer") else PLAIN
    after_every_step(monkeypatch, FAULTS[name])
    report = run(dataclasses.replace(world, precision=precision))
    assert report.verdict == WRONG
    assert name in [fault.split(":")[0] for fault in report.faults]


def test_a_refusal_that_has_moved_something_is_torn(monkeypatch):
    after_every_step(monkeypatch, refused_late)
    report = run(PLAIN)
    assert report.verdict == TORN
    assert "steps" in report.faults
    assert any(name.startswith("model layers.0") for name in report.faults)


def test_refusals_and_raw_errors(monkeypatch):
    amiss = dataclasses.replace(PLAIN, step={**PLAIN_STEP, "selector_every": 0})
    assert run(amiss).verdict == REFUSED

    def broken(step, *args, **kwargs):
        raise KeyError("momentum")

    monkeypatch.setattr(mts_fast.MTSStep, "__call__", broken)
    assert run(PLAIN).verdict == TRACEBACK


def test_shrinking_keeps_the_fault_and_drops_the_rest(monkeypatch):
    after_every_step(monkeypatch, scaled_dots)
    rich = dataclasses.replace(
        PLAIN,
        layers=[{"kind": "mlp"}, {"kind": "dropout"}, {"kind": "linear", "bias": True}],
        loss="focal",
        step={**PLAIN_STEP, "schedule": "reuse", "micro_batch": 2},
    )
    small = shrunk(rich)
    assert (len(small.layers), small.loss, small.calls) == (1, "cross_entropy", 1)
    assert small.step == PLAIN_STEP
    assert World.from_json(small.to_json()) == small
