"""A run that was saved and resumed continues bit for bit as an uninterrupted one."""

import copy
import io

import pytest
import torch
from comparison import assert_bitwise, generators, set_generators, snapshot
from step_run import StepRun

from mts_fast.training import warmup_cosine

# BatchNorm buffers, dropout masks, optimizer moments, running statistics, a schedule and
# `selector_every`: everything that a state must hold.
OPTIONS = {
    "model": "dense",
    "online_momentum": 0.9,
    "selector_every": 2,
    "warmup_steps": 4,
    "schedule": lambda optimizer: warmup_cosine(optimizer, 2, 10),
}


def take_steps(run, calls):
    return [run.step(**run.arguments(seed)) for seed in calls]


def everything(run):
    return (
        snapshot(module=run.model, optimizer=run.optimizer, device=run.device),
        snapshot(module=run.selector, optimizer=run.selector_optimizer),
        run.step.state_dict(),
    )


def through_a_file(state):
    """Saved as a user does, and read with torch's safe unpickler."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture(autouse=True)
def deterministic():
    """Bitwise claims need kernels that sum in one order."""
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


@pytest.mark.parametrize(
    "optimizer", ["nesterov", "adamw"]
)  # one buffer per tensor; two and a step count
@pytest.mark.parametrize("way", [through_a_file, lambda state: state], ids=["file", "memory"])
def test_resumed_run_is_bit_identical(way, optimizer, device):
    whole = StepRun(device, optimizer=optimizer, **OPTIONS)
    torch.manual_seed(1)
    take_steps(whole, range(3))
    state, rng = way(whole.step.state_dict()), generators(device)
    resumed = StepRun(device, optimizer=optimizer, **OPTIONS)
    # the fresh run differs from the saved one before it loads
    assert not torch.equal(resumed.model[0].weight, whole.model[0].weight)
    resumed.step.load_state_dict(state)
    set_generators(rng)
    expected = take_steps(whole, range(3, 6))
    set_generators(rng)
    results = take_steps(resumed, range(3, 6))
    assert_bitwise([vars(r) for r in results], [vars(r) for r in expected])
    assert_bitwise(everything(resumed), everything(whole))
    assert resumed.step.steps == 6


def test_loading_does_not_tie_two_runs_together(device):
    """torch's optimizers use a loaded state's tensors themselves: two runs would share momentum."""
    first = StepRun(device, optimizer="nesterov")
    take_steps(first, range(2))
    second = StepRun(device, optimizer="nesterov")
    second.step.load_state_dict(first.step.state_dict())
    before = everything(first)[:2]
    take_steps(second, range(2, 4))
    after = everything(first)[:2]
    # the second run drew no random numbers and must have touched nothing of the first
    assert_bitwise(after, before)


def without_group_option(state):
    del state["optimizer"]["param_groups"][0]["lr"]


def without_moment(state):
    del state["optimizer"]["state"][0]["exp_avg"]


def of_another_scheduler(state):
    state["selector_scheduler_class"] = "StepLR"


def with_another_loss(state):
    state["losses"] = [{}]


def of_another_optimizer(state):
    state["selector_optimizer_class"] = "SGD"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_group_option, r"state\['optimizer'\] must be of AdamW, got .*\(lr\)"),
        (without_moment, r"state\['optimizer'\] of parameter 0 must be complete.*exp_avg"),
        (of_another_scheduler, r"state\['selector_scheduler'\] must be of LambdaLR, got StepLR"),
        (with_another_loss, r"state\['losses'\] must be of 0 modules among the losses, got 1"),
        (of_another_optimizer, r"state\['selector_optimizer'\] must be of AdamW, got SGD"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(spoil, message, device):
    run = StepRun(device, optimizer="adamw", **OPTIONS)
    take_steps(run, range(2))
    state = copy.deepcopy(run.step.state_dict())
    take_steps(run, range(2, 3))
    before = copy.deepcopy(everything(run))
    spoil(state)
    with pytest.raises(ValueError, match=message):
        run.step.load_state_dict(state)
    assert_bitwise(everything(run), before)
