"""label_agreement: the C++ kernel against the eager reference, equal results asserted first."""

import pytest
import torch

import mts_fast
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops.label_agreement import label_agreement

# the paper's K, and pools from a small study to ImageNet's size
NEIGHBORS = 5
POOLS = (16_384, 262_144, 1_048_576)


def make_pool(size):
    """Random neighbour lists of a pool with 100 classes."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(size, NEIGHBORS, generator=generator)
    neighbors = torch.randint(size, (size, NEIGHBORS), generator=generator)
    return similarity, neighbors, torch.randint(100, (size,), generator=generator)


@pytest.mark.parametrize("size", POOLS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.benchmark(warmup=True, min_rounds=15)
def bench_label_agreement(benchmark, backend, size):
    """Bytes that must move: K similarities, indices and labels, the sample's label, two results."""
    if backend == "cpp" and not extension().available:
        pytest.skip(extension().reason)
    pool = make_pool(size)
    with mts_fast.use_backend("reference"):
        expected = label_agreement(*pool)
    benchmark.group = f"label_agreement N={size}"
    with mts_fast.use_backend(backend):
        torch.testing.assert_close(label_agreement(*pool), expected)
        benchmark(lambda: label_agreement(*pool))
    moved = size * (NEIGHBORS * (4 + 8 + 8) + 8 + 2 * 4)
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
