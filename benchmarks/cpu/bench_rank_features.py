"""Distribution features of a pool over ranks: processor time of all ranks together, over that of
one process on the joined pool. The columns are compared first."""

import pytest
import torch
from rank_pool_times import of_one, of_ranks

SIZES = (2, 4)
POOL, WIDTH = 12_000, 256


@pytest.mark.parametrize("size", SIZES)
def bench_rank_features(benchmark, size):
    whole, seconds = of_one(POOL, WIDTH)
    results = {}

    def measure():
        results["parts"], results["seconds"] = of_ranks(POOL, WIDTH, size)

    benchmark.pedantic(measure, rounds=1)
    for name, column in whole.items():
        joined = torch.cat([part[name] for part in results["parts"]])
        torch.testing.assert_close(joined, column, rtol=1e-12, atol=1e-12)
    benchmark.extra_info["ratios"] = {
        f"processor time, {size} ranks": round(results["seconds"] / seconds, 3)
    }
