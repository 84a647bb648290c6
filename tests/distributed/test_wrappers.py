"""Wrappers and process groups that a step does not take."""

import pytest
import torch
from torch import nn

import mts_fast


def small_parts():
    model, selector = nn.Linear(4, 3), mts_fast.Selector(4, 3)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "selector": selector,
        "selector_optimizer": torch.optim.AdamW(selector.parameters()),
    }


def test_wrappers_inside_the_model_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    arguments = small_parts()
    arguments["model"] = nn.Sequential(DistributedDataParallel(arguments["model"]))
    with pytest.raises(RuntimeError, match=r"model must be free of data-parallel .* at '0'"):
        mts_fast.MTSStep(**arguments)


def test_the_older_sharding_is_refused():
    class FullyShardedDataParallel(nn.Sequential):
        """As it is named; torch's own needs a GPU."""

    arguments = small_parts()
    arguments["model"] = FullyShardedDataParallel(arguments["model"])
    with pytest.raises(RuntimeError, match="model must be sharded by fully_shard, got Fully"):
        mts_fast.MTSStep(**arguments)


@pytest.mark.parametrize("group", ["ranks", 3, nn.Linear(2, 2)])
def test_what_is_no_process_group_is_refused(group):
    with pytest.raises(TypeError, match="process_group must be a process group"):
        mts_fast.MTSStep(**small_parts(), process_group=group)


@pytest.mark.parametrize("group", ["auto", None])
def test_torchrun_without_a_process_group(monkeypatch, group):
    """Each process would train by itself, unnoticed."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if group is None:
        assert mts_fast.MTSStep(**small_parts(), process_group=None).steps == 0
        return
    with pytest.raises(RuntimeError, match=r"MTSStep: process_group must be initialised, got none"):
        mts_fast.MTSStep(**small_parts(), process_group=group)


def test_an_optimizer_of_before_the_sharding():
    arguments = small_parts()
    arguments["model"] = nn.Linear(4, 3)  # other parameters, as after fully_shard
    with pytest.raises(ValueError, match=r"build it with model.parameters\(\), after model was"):
        mts_fast.MTSStep(**arguments)
