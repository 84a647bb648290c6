"""percentile_rank: the C++ kernel against two sorts of torch, equal ranks asserted first."""

import pytest
import torch

import mts_fast
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import percentile_rank

CLASSES = (10, 1000)
POOLS = (16_384, 1_048_576)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("size", POOLS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def bench_percentile_rank(benchmark, backend, size, classes):
    if backend == "cpp" and not extension().available:
        pytest.skip(extension().reason)
    g = torch.Generator().manual_seed(0)
    pool = torch.rand(size, generator=g), torch.randint(classes, (size,), generator=g)
    with mts_fast.use_backend("reference"):
        expected = percentile_rank(*pool)
    benchmark.group = f"percentile_rank N={size} C={classes}"
    with mts_fast.use_backend(backend):
        torch.testing.assert_close(percentile_rank(*pool), expected, rtol=1e-6, atol=0)
        benchmark.pedantic(lambda: percentile_rank(*pool), rounds=15, warmup_rounds=2)
