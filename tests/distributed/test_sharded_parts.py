"""Sharded models of which a part is frozen, or measured by another loss."""

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
