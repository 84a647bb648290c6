"""Schedulers of the rate and averages of the weights: over ranks as in one process."""

import pytest
import torch
from rank_pool import SLOW
from rank_schedules import train_scheduled


@pytest.mark.parametrize(
    ("kind", "scheduler", "optimizer"),
    [
        ("ddp", "one cycle", "sgd"),
        ("sharded", "lambda", "adamw"),
        ("ddp", "warm-up, then cosine", "adamw"),
        pytest.param("plain", "lambda", "sgd", marks=SLOW),
        pytest.param("sharded", "one cycle", "adamw", marks=SLOW),
        pytest.param("sharded", "warm-up, then cosine", "sgd", marks=SLOW),
    ],
)
def test_schedules_and_averages(ranks, kind, scheduler, optimizer):
    alone = train_scheduled(None, "plain", scheduler, optimizer, (12,))
    assert len(set(alone[-1].tolist())) > 5
    assert not torch.allclose(alone[0][0], alone[1][0], atol=1e-3)  # weights and their average
    for rank in ranks.results(train_scheduled, 2, kind, scheduler, optimizer, (7, 5)):
        torch.testing.assert_close(rank, alone, rtol=1e-10, atol=1e-12)
