"""Launches and waits of a step as on a GPU, counted here: what a change adds to them shows.

Calls 1, 2, 4, 8, ... also check what the results rest on; they are not counted.
"""

import pytest
import torch
from deep_models import DEEP_MODELS
from device_work import HostData, Launches, Waits, taken_for_a_gpu

import mts_fast

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(
        p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True
    ),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
}
# launches of an exact step and of one that uses row 3's gradient again, 2026
MOST = {
    ("ViT-12", "sgd"): (1500, 1330),
    ("ViT-12", "adamw"): (1580, 1410),
    ("ResNet-18", "sgd"): (900, 810),
    ("ResNet-18", "adamw"): (960, 870),
    ("ResNet-50", "sgd"): (2010, 1820),
    ("ResNet-50", "adamw"): (2090, 1895),
}
UNCHECKED = 4  # calls before one that checks nothing


def make_step(name, optimizer, **options):
    torch.manual_seed(0)
    model = DEEP_MODELS[name]()
    selector = mts_fast.Selector(4 + 5, 10)
    step = mts_fast.MTSStep(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=1e-3, foreach=True),
        hypergradient_lr=0.01,
        online_features=True,
        **options,
    )
    x, vx, features = torch.randn(8, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.randn(8, 5)
    y, vy, synthetic = torch.randint(10, (8,)), torch.randint(10, (4,)), torch.arange(8) % 2 == 0

    def take():
        return step(x, y, features=features, is_synthetic=synthetic, val_inputs=vx, val_labels=vy)

    return step, take


def steps_taken(step):
    """The counts of steps that torch keeps on the host."""
    states = [*step.optimizer.state.values(), *step.selector_optimizer.state.values()]
    return [state["step"] for state in states if "step" in state]


@pytest.mark.parametrize(("name", "optimizer"), list(MOST))
def test_launches(name, optimizer, monkeypatch):
    counts = []
    for schedule in ("exact", "reuse"):
        _, take = make_step(name, optimizer, schedule=schedule)
        with taken_for_a_gpu(monkeypatch):
            for _ in range(UNCHECKED):
                take()
            with Launches() as launches:
                take()
        counts.append(sum(launches.by_name.values()))
    for count, most in zip(counts, MOST[name, optimizer], strict=True):
        # above: something was added to every step. Far below: lower the number here
        assert 0.9 * most <= count <= most, counts


@pytest.mark.parametrize("options", [{}, {"schedule": "reuse"}, {"compute": 4}, {"micro_batch": 4}])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["ViT-12", "ResNet-18"])
def test_nothing_waits(name, optimizer, options, monkeypatch):
    if name == "ResNet-18" and "micro_batch" in options:
        pytest.skip("BatchNorm's samples of a batch are not divided")
    step, take = make_step(name, optimizer, **options)
    with taken_for_a_gpu(monkeypatch):
        for _ in range(UNCHECKED):
            take()
        with Waits(steps_taken(step)) as waits, HostData() as data:
            take()
    assert waits.places == []
    assert data.places == []


def test_what_waits_is_seen():
    x = torch.arange(3.0)
    with Waits() as waits, HostData() as data:
        float(x.sum())
        x[x > 1]
        torch.tensor([1.0])
        x.sum()
    assert [place.split(".")[0] for place in waits.places] == ["_local_scalar_dense", "index"]
    assert len(data.places) == 1
    with Waits([x]) as waits:
        float(x[0])
    assert waits.places == []
