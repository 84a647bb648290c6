"""Losses that are 0 up to rounding: the guard knows what rounding does to dots there."""

import logging

import pytest
import torch
from torch import nn

import mts_fast
from mts_fast.hypergradient.guard import EXACT, saturation


def fitted(batchnorm, scale):
    """A classifier that has learned its batch by heart, its logits scaled up further."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = (x[:, 0] > 0).long()
    x[:, 0] += (2 * y - 1) * 2
    norm = [nn.BatchNorm1d(32)] if batchnorm else []
    model = nn.Sequential(nn.Linear(8, 32), *norm, nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter *= scale
    return model, x, y


# losses of 5e-7, of 2e-8 and of 0, where all dots are rounding
@pytest.mark.parametrize("scale", [2, 2.5, 4])
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("engine", ["auto", "double_backward", "forward_mode", "finite_difference"])
def test_a_batch_that_is_learned_by_heart_is_trained_on(engine, batchnorm, scale, caplog):
    model, x, y = fitted(batchnorm, scale)
    selector = mts_fast.Selector(4 + 2, 2)
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-9),
        selector,
        torch.optim.AdamW(selector.parameters()),
        engine=engine,
    )
    with caplog.at_level(logging.WARNING, logger="mts_fast"):
        for _ in range(4):  # calls 1, 2 and 4 are checked, call 3 by the next
            result = step(x, y, features=torch.randn(64, 2), val_inputs=x[:16], val_labels=y[:16])
    assert float(result.loss) < 1e-5
    assert not caplog.records


def test_ordinary_losses_get_no_allowance():
    eps = torch.finfo(torch.float32).eps
    p = torch.full((4,), 0.25)
    for losses in (torch.ones(4), torch.tensor([0.0, 0.0, 0.0, 0.1])):
        assert float(saturation(p, losses, eps, logarithmic=True)) < EXACT / 20
    # a square's derivative falls more slowly than it does
    small = torch.full((4,), 1e-8)
    by_square = float(saturation(p, small, eps, logarithmic=False))
    assert by_square == pytest.approx(4 * eps / 1e-4, rel=1e-4)
    assert float(saturation(p, small, eps, logarithmic=True)) == pytest.approx(4 * eps / 1e-8)
