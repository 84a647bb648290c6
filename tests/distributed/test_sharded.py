"""Models under fully_shard (FSDP2): shards of one process's result."""

import pytest
import torch
from rank_pool import SLOW
from rank_sharded import (
    bytes_of_one,
    engine_of,
    refusal,
    resume_sharded,
    sharded_bytes,
    train_sharded,
    undone,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# a difference over a step h of 1e-5 loses the digits of h; observed 2e-9
NEAR = {"rtol": 1e-8, "atol": 1e-10}


def assert_equals_one_process(ranks, size, options, **tolerance):
    tolerance = EXACT | tolerance
    several = ranks.results(train_sharded, size, options, (12 // size,) * size)
    alone = train_sharded(None, options, (12,))
    for rank in several:
        for part in (0, 1):
            torch.testing.assert_close(rank[part], alone[part], **tolerance)
    if options.get("accumulate"):
        return  # the joined batch has the same samples in another order
    for call, (dots, p, loss, val_loss) in enumerate(alone[2]):
        here = [rank[2][call] for rank in several]
        if dots is not None:
            torch.testing.assert_close(torch.cat([r[0] for r in here]), dots, **tolerance)
        torch.testing.assert_close(torch.cat([r[1] for r in here]), p, **tolerance)
        for rank in here:
            torch.testing.assert_close(rank[2], loss, **tolerance)
            torch.testing.assert_close(rank[3], val_loss, **tolerance)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=SLOW)])
def test_differences(ranks, size, optimizer):
    options = {"engine": "finite_difference", "optimizer": optimizer}
    assert_equals_one_process(ranks, size, options, **NEAR)


OPTIONS = [
    {},
    {"online": False, "max_grad_norm": 0.3},
    {"micro_batch": 2},
    {"val_objective": "worst_group"},
    {"accumulate": 2},
    {"shard": {"reshard_after_forward": True}},
    {"shard": {"reshard_after_forward": False}},
    {"track_gsnr": True, "selector_every": 2},
]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "schedule": "reuse"},
        {"max_grad_norm": 0.05, "clip_virtual_step": True},
        *(pytest.param(o, marks=SLOW) for o in OPTIONS),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_ghost(ranks, size, options):
    assert_equals_one_process(ranks, size, options | {"engine": "ghost"})


def test_auto_takes_ghost(ranks):
    assert ranks.results(engine_of, 2, {}) == ["ghost"] * 2


def test_parameters_in_16_bit_within_passes(ranks):
    """FSDP's mixed precision: dots near those of float64; differences are not served there."""
    options = {"half": True, "dtype": torch.float32}
    several = ranks.results(train_sharded, 2, options, (6, 6), 2)
    alone = train_sharded(None, {}, (12,), 2)
    dots = torch.cat([rank[2][0][0] for rank in several])
    assert torch.cosine_similarity(dots.double(), alone[2][0][0], dim=0) > 0.999
    text = ranks.results(refusal, 2, options | {"engine": "finite_difference"})
    assert all("differences drown where FSDP casts to torch.bfloat16" in t for t in text)


REFUSED = {
    "double_backward": "the model is sharded (fully_shard)",
    "forward_mode": "the model is sharded (fully_shard)",
    "muon": "optimizer must be elementwise where the model is sharded, got Muon",
    "offload": "model must be sharded on its device, got CPU offload",
    "partly": "parameter 'first.weight' must be sharded along its first axis",
    "uneven": "the number of micro-batches must be the same on every rank",
    "empty": "inputs must be given on every rank of a sharded model",
    "scaler": "scaler must be None where the model is sharded",
    "compute": "compute must be None where the model is sharded",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_is_refused_by_name(ranks, what):
    for text in ranks.results(refusal, 2, {"refused": what}):
        assert REFUSED[what] in text, text


def test_a_saved_state_goes_on(ranks):
    for straight, resumed in ranks.results(resume_sharded, 2):
        torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_a_call_that_raises_is_undone(ranks):
    for text, same in ranks.results(undone, 2):
        assert "features must be finite" in text and same


def test_memory_of_a_rank(ranks):
    """Parameters, optimizer state, theta' and v: a quarter of one process's, and a layer."""
    (whole, *_) = ranks.results(bytes_of_one, 2)
    for part in ranks.results(sharded_bytes, 4):
        assert part <= 0.35 * whole, part / whole
