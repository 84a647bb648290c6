"""The automatic choice: which engine, said once, and nothing of a failed try left behind."""

import copy
import logging

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot
from models import make_case

from mts_fast.hypergradient import (
    ENGINES,
    EngineChoice,
    LabelledBatch,
    Objective,
    Refused,
    Streamed,
    make_engine,
)

TAKES = {
    "mlp": "ghost",
    "transformer": "ghost",
    "tied": "ghost",
    "dropout_mlp": "ghost",
    "partly_frozen": "ghost",
    "batchnorm_cnn": "forward_mode",
    "lstm": "double_backward",
}
# finite differences in float64; observed 3e-10
TOLERANCE = 3e-9


def built(name, device, **options):
    case = make_case(name, device)
    parameters = list(case.named().values())
    return case, EngineChoice(Objective(case.model), parameters, **options)


def linearize(engines, batch):
    """The forward of a batch by whichever engine takes it, and the choice made."""
    layout = engines.layout_of(batch)
    engines.begin()
    while True:
        try:
            linearization = engines.engine_for(layout).linearize(batch)
            break
        except Refused as refused:
            engines.refuse(layout, refused)
    engines.served(layout)
    engines.commit()
    return linearization


def said(caplog):
    """What was said of engines; ops say which backend they run on."""
    lines = [r.getMessage() for r in caplog.records if r.name == "mts_fast"]
    return [line for line in lines if "runs on backend" not in line]


@pytest.mark.parametrize("name", TAKES)
def test_takes_and_says_once(name, device, caplog):
    case, engine = built(name, device)
    batch = LabelledBatch(case.inputs, case.labels)
    with caplog.at_level(logging.INFO, "mts_fast"):
        for _ in range(3):
            linearize(engine, batch)
    assert len(said(caplog)) == 1
    assert f"engine='auto' takes {TAKES[name]}" in said(caplog)[0]


def test_says_why_not_ghost(device, caplog):
    case, engine = built("batchnorm_cnn", device)
    with caplog.at_level(logging.INFO, "mts_fast"):
        linearize(engine, LabelledBatch(case.inputs, case.labels))
    assert "1: BatchNorm2d in train mode mixes the samples" in said(caplog)[0]
    assert "4: BatchNorm2d in train mode mixes the samples" in said(caplog)[0]


def test_decides_anew_when_modes_change(device, caplog):
    case, engine = built("batchnorm_cnn", device)
    batch = LabelledBatch(case.inputs, case.labels)
    with caplog.at_level(logging.INFO, "mts_fast"):
        linearize(engine, batch)
        case.model.eval()
        linearize(engine, batch)
        case.model.train()
        linearize(engine, batch)
    assert ["takes ghost" in line for line in said(caplog)] == [False, True]


@pytest.mark.parametrize("name", ["norm_and_dropout", "lstm"])
def test_a_refused_try_leaves_one_forwards_trace(name, device):
    """The forward that ghost refuses moves statistics and draws masks: that is undone."""
    case, engine = built(name, device)
    other = copy.deepcopy(case)
    torch.manual_seed(0)
    linearization = linearize(engine, LabelledBatch(case.inputs, case.labels))
    state = snapshot(module=case.model, device=device)
    torch.manual_seed(0)
    losses = Objective(other.model).losses(LabelledBatch(other.inputs, other.labels))
    assert_bitwise(state, snapshot(module=other.model, device=device))
    assert torch.equal(linearization.losses, losses.detach())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "dropout_mlp", "transformer", "dict_inputs"])
@pytest.mark.parametrize("gradients_first", [True, False])
def test_micro_batches_add_up(name, engine, gradients_first, device):
    """Losses, gradients and dots of a streamed batch are those of its parts, masks included."""
    case = make_case(name, device)
    parameters = list(case.named().values())
    objective, batch = Objective(case.model), LabelledBatch(case.inputs, case.labels)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    weights = torch.rand(2, len(batch), generator=generator, dtype=torch.float64).to(device)
    streamed = Streamed(make_engine(engine, objective, parameters), 4)
    torch.manual_seed(0)
    linearization = streamed.linearize(batch)
    if not gradients_first:
        _ = linearization.losses
    results = [
        linearization.gradient(weights[0]),
        linearization.dots(direction),
        linearization.gradient(weights[1]),
    ]
    after = snapshot(device=device)

    torch.manual_seed(0)
    whole = make_engine("finite_difference", objective, parameters)
    parts = [whole.linearize(part) for part in batch.split(4)]
    assert_bitwise(after, snapshot(device=device))
    # double backward takes the unfused attention, which rounds otherwise; observed 2e-16
    assert relative(linearization.losses, torch.cat([part.losses for part in parts])) < 1e-15
    for got, p in ((results[0], weights[0]), (results[2], weights[1])):
        pieces = [part.gradient(q) for part, q in zip(parts, p.split(4), strict=True)]
        for g, first, second in zip(got, *pieces, strict=True):
            assert relative(g, first + second) < 1e-12  # observed 3e-16
    dots = torch.cat([part.dots(direction) for part in parts])
    assert relative(results[1], dots) < TOLERANCE


def test_a_small_batch_is_not_streamed(device):
    case, engine = built("mlp", device, micro_batch=len(make_case("mlp", device).labels))
    linearization = linearize(engine, LabelledBatch(case.inputs, case.labels))
    assert type(linearization).__name__ == "StoredLinearization"
