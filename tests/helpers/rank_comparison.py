"""Compares what ranks of a pool give with what one process gives on their joined batch."""

import pytest
import torch
from rank_jobs import train

ENGINES = ("ghost", "double_backward", "forward_mode", "finite_difference")
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64; observed 1e-15
CALLS = 10


def joined(results, call, name):
    """Each rank's rows of one result, as one."""
    return torch.cat([r["results"][call][name] for r in results])


def assert_equals_one_process(pool, size, options, sizes=None, val_sizes=None, **tolerance):
    sizes, val_sizes = sizes or (12 // size,) * size, val_sizes or (8 // size,) * size
    several = pool.results(train, size, options, sizes, val_sizes, CALLS)
    alone = train(None, options, (sum(sizes),), (sum(val_sizes),), CALLS)
    tolerance = EXACT | tolerance
    for rank in several:
        for part in ("model", "selector", "momentum"):
            torch.testing.assert_close(rank[part], alone[part], **tolerance)
            assert_same_bits(rank[part], several[0][part])
    for call in range(CALLS):
        of_one = alone["results"][call]
        for name in ("losses", "weights", "normalized_weights", "dots"):
            if of_one[name] is not None:
                of_all = joined(several, call, name)
                torch.testing.assert_close(of_all, of_one[name], **tolerance)
        for rank in several:
            of_rank = rank["results"][call]
            assert of_rank["engine"] == of_one["engine"]
            assert_same_draw(of_rank["sampling"], of_one["sampling"], tolerance)
            for name in ("loss", "val_loss", "gsnr", "statistics"):
                torch.testing.assert_close(of_rank[name], of_one[name], **tolerance)
    return several, alone


def assert_same_draw(of_rank, of_one, tolerance):
    assert (of_rank is None) == (of_one is None)
    for name, value in (of_one or {}).items():
        if value is None:
            assert of_rank[name] is None
        else:
            assert of_rank[name] == pytest.approx(
                value, rel=tolerance["rtol"], abs=tolerance["atol"]
            )


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
