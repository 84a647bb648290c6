"""Neighbour statistics on a GPU: the CUDA kernels, which `auto` does not choose, against torch;
equal similarities are asserted first."""

import pytest
import torch
from measure import peak_bytes, ratios
from neighbor_pools import ALLOWED, NEIGHBORS, SIZES, K, make_pool, torch_tiles

import mts_fast
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import neighbor_statistics
from mts_fast.tuning.timing import interleaved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("size", "dimension"), SIZES)
def bench_neighbor_statistics(benchmark, size, dimension):
    if not extension().info.get("cuda"):
        pytest.skip("the extension was built without CUDA")
    pool = tuple(t.cuda() for t in make_pool(size, dimension))

    def run(backend):
        with mts_fast.use_backend(backend):
            return neighbor_statistics(*pool, k=K, neighbors=NEIGHBORS).similarity

    calls = {
        "CUDA": lambda: run("cpp"),
        "reference backend": lambda: run("reference"),
        "torch tiles + topk": lambda: torch_tiles(*pool),
    }
    for label, call in calls.items():
        assert (call() - calls["CUDA"]()).abs().max() < ALLOWED, label
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, 5)), rounds=1)
    benchmark.extra_info |= {
        "N": size,
        "D": dimension,
        "device": torch.cuda.get_device_name(),
        "ratios": {label: round(r, 3) for label, r in ratios(seconds, "CUDA").items()},
        "peak_mib": {label: round(peak_bytes(call) / 2**20) for label, call in calls.items()},
    }
