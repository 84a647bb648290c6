"""Sharded models of which a part is frozen, or measured by another loss."""

import pytest
import rank_sharded_parts
import torch

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def test_frozen_parameters(ranks):
    alone = rank_sharded_parts.frozen(None)
    for rank in ranks.results(rank_sharded_parts.frozen, 2):
        torch.testing.assert_close(rank, alone, **EXACT)


def test_a_loss_of_the_validation_batch(ranks):
    alone = rank_sharded_parts.other_val_loss(None)
    for rank in ranks.results(rank_sharded_parts.other_val_loss, 2):
        torch.testing.assert_close(rank, alone, **EXACT)


@pytest.mark.parametrize("sizes", [(6, 6), (3, 9), (9, 3)])
def test_a_layer_without_gradients_on_one_rank(ranks, sizes):
    """Where its samples lie is not known there; the passes that look for them are those of all."""
    alone = rank_sharded_parts.closed_on_one_rank(None, sizes)
    for rank in ranks.results(rank_sharded_parts.closed_on_one_rank, 2, sizes):
        torch.testing.assert_close(rank, alone, **EXACT)


def test_a_layer_that_ghost_refuses_after_its_forward(ranks):
    for text in ranks.results(rank_sharded_parts.refused_after_the_forward, 2, "ghost"):
        assert "needs the values of parameters again" in text, text
    alone = rank_sharded_parts.refused_after_the_forward(None, "finite_difference")
    for rank in ranks.results(rank_sharded_parts.refused_after_the_forward, 2, "auto"):
        torch.testing.assert_close(rank, alone, rtol=1e-6, atol=1e-8)
