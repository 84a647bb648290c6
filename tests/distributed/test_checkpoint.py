"""torch.distributed.checkpoint: a run goes on by other ranks as it would have without a break."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_checkpoint import EACH, load_without_planner, make_step, run, summary
from rank_pool import SLOW

from mts_fast.distributed.checkpoint import StepLoadPlanner

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(
    ("kinds", "optimizer"),
    [
        pytest.param(("sharded", "sharded"), "adamw", marks=SLOW),
        pytest.param(("ddp", "ddp"), "adamw", marks=SLOW),
        (("ddp", "sharded"), "sgd"),
        pytest.param(("plain", "plain"), "sgd", marks=SLOW),
        pytest.param(("sharded", "ddp"), "adamw", marks=SLOW),
    ],
    ids=str,
)
def test_two_ranks_then_four_then_one(ranks, tmp_path, kinds, optimizer):
    straight = run(None, "plain", str(tmp_path / "alone"), 0, (12,), optimizer, 3 * EACH)
    folder = str(tmp_path)
    ranks.results(run, 2, kinds[0], folder, 0, (6, 6), optimizer)
    ranks.results(run, 4, kinds[1], folder, EACH, (3, 3, 3, 3), optimizer)
    alone = run(None, "plain", folder, 2 * EACH, (12,), optimizer)
    torch.testing.assert_close(alone[0], straight[0], **EXACT)
    assert alone[1] == straight[1][2 * EACH :]  # the order of the samples
    for rank in ranks.results(run, 2, kinds[0], folder, 2 * EACH, (6, 6), optimizer):
        torch.testing.assert_close(rank[0], straight[0], **EXACT)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=SLOW), "sharded"])
def test_a_load_without_the_planner_is_refused(ranks, tmp_path, kind):
    """It would leave the optimizers without their state."""
    ranks.results(run, 2, kind, str(tmp_path), 0, (6, 6))
    for texts, steps in ranks.results(load_without_planner, 2, kind, str(tmp_path / str(EACH))):
        text, of_the_call = texts
        assert "state['optimizer'] must be given the state of 14 parameters" in text, text
        assert "StepLoadPlanner" in text
        # torch has written the parameters by then
        assert "by a checkpoint that was read in part" in of_the_call
        assert steps == EACH + 1


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    dcp.save({"other": {"a": torch.zeros(2)}}, checkpoint_id=tmp_path)
    state = {"step": make_step(None, "plain")}
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(state, checkpoint_id=tmp_path, planner=StepLoadPlanner(state))
    assert "the checkpoint must be given 'step', got 'other'" in str(caught.value.failures)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    run(None, "plain", str(tmp_path), 0, (12,))
    step = make_step(None, "plain", "sgd")
    before = summary(step)
    state = {"step": step}
    with pytest.raises(ValueError, match=r"state\['optimizer'\] must be of SGD, got AdamW"):
        dcp.load(state, checkpoint_id=tmp_path / str(EACH), planner=StepLoadPlanner(state))
    torch.testing.assert_close(summary(step), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (3, TypeError, "state must be a mapping, got"),
        ({}, ValueError, "state must be given an MTSStep, got nothing"),
        ({"model": torch.nn.Linear(2, 2)}, ValueError, "given an MTSStep, got 'model': "),
    ],
)
def test_arguments(state, error, message):
    with pytest.raises(error, match=f"StepLoadPlanner: .*{message}"):
        StepLoadPlanner(state)
