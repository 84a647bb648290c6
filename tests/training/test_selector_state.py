"""Selectors with dropout, BatchNorm, autocast, or parameters outside their optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from small_steps import CLASSES, SIZE, batch, generators, plain_model, step_of
from step_run import StepRun
from torch import nn

import mts_fast


class NoisySelector(nn.Module):
    """A selector with dropout, which draws, and BatchNorm, which keeps statistics."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(CLASSES, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 1)
        self.masks = []

    def forward(self, features, classes, is_synthetic):
        h = self.drop(self.norm(self.embed(classes)))
        self.masks.append(h.detach() == 0)
        return self.head(h)


@pytest.mark.parametrize("two_batches", [False, True])
def test_a_selector_draws_afresh_and_moves_its_statistics_once(two_batches):
    selector = NoisySelector().double()
    step = step_of(plain_model(), selector=selector)
    seen = []
    for seed in range(3):
        arguments = batch(seed)
        if two_batches:
            extra = batch(seed + 50)
            arguments["selector_batch"] = mts_fast.SelectorBatch(extra["inputs"], extra["labels"])
        selector.masks.clear()
        step(**arguments)
        assert int(selector.norm.num_batches_tracked) == seed + 1
        # rows 1 and 9 see the same mask
        assert torch.equal(selector.masks[0], selector.masks[-1])
        seen.append(selector.masks[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_weights_change_nothing():
    selector = NoisySelector().double()
    step = step_of(plain_model(), selector=selector)
    arguments = batch(0)
    before = copy.deepcopy(selector.state_dict()), str(generators())
    step.weights(arguments["inputs"], arguments["labels"], val_inputs=arguments["val_inputs"])
    assert all(torch.equal(before[0][k], v) for k, v in selector.state_dict().items())
    assert before[1] == str(generators())


def test_weights_need_validation_inputs_for_online_features_alone():
    run = StepRun(torch.device("cpu"), online_features=False)
    arguments = run.arguments(0)
    validation = arguments.pop("val_inputs")
    del arguments["val_labels"]
    without = run.step.weights(**arguments)
    assert torch.equal(without, run.step.weights(**arguments, val_inputs=validation))
    online = StepRun(torch.device("cpu"))
    with pytest.raises(TypeError, match="val_inputs must be given for online features, got None"):
        online.step.weights(**arguments)


def test_autocast_does_not_weigh_with_the_old_selector():
    """Row 9 and the next call, inside one autocast, use current weights, not cached casts."""
    model = plain_model().float()
    torch.manual_seed(1)
    selector = mts_fast.Selector(0, CLASSES, hidden=(8,))
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.SGD(selector.parameters(), lr=50.0),
        online_features=False,
    )
    arguments = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            result = step(**arguments)
            torch.clear_autocast_cache()
            z = selector(torch.zeros(SIZE, 0), arguments["labels"], torch.zeros(SIZE).bool())
            assert relative(result.logits, z.detach().float()) < 1e-6
            losses = F.cross_entropy(model(arguments["inputs"]).float(), arguments["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        first = step(**arguments).losses.mean()
        second = step(**arguments).losses.mean()
    assert first != second and losses > second


def test_a_selector_updates_its_optimizers_parameters_alone():
    selector = nn.ModuleDict({"a": nn.Embedding(CLASSES, 4), "b": nn.Linear(4, 1)}).double()
    selector.forward = lambda h, y, s: selector["b"](selector["a"](y) + h.sum(1, keepdim=True))
    model = plain_model()
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector["b"].parameters(), lr=0.05),
        online_features=False,
    )
    features = torch.randn(SIZE, 2, dtype=torch.float64, requires_grad=True)
    for seed in range(2):
        step(**batch(seed), features=features)
        assert selector["a"].weight.grad is None and features.grad is None
