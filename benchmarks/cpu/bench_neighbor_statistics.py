"""Distribution features of a pool: mts_fast, full matrices, torch in tiles, and faiss.

Equal similarities are asserted first; the implementations take turns. faiss and the tiles of torch
compute less than mts_fast: faiss the pool's neighbours alone, torch no centroids and ranks. Peak
memory is resident memory above what the process held before, so it includes other libraries'.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from measure import peak_resident_bytes, ratios
from neighbor_pools import ALLOWED, NEIGHBORS, SIZES, K, make_pool, torch_tiles

import mts_fast
from mts_fast import reference
from mts_fast.features import distribution_features
from mts_fast.ops import neighbor_statistics
from mts_fast.tuning.timing import interleaved

# largest N of the implementations that would take too long, or not fit in memory, beyond it
LARGEST = {"full matrices": 8192, "reference backend": 8192, "torch tiles + topk": 16384}
BASE = "faiss, pool neighbours alone"


def faiss_search(unit, threads):
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    # the nearest neighbour is the sample itself
    return torch.from_numpy(index.search(unit, NEIGHBORS + 1)[0][:, 1:])


def with_reference(pool):
    with mts_fast.use_backend("reference"):
        return neighbor_statistics(*pool, k=K, neighbors=NEIGHBORS).similarity


def implementations(pool, threads):
    """Label -> call, which returns the largest similarities in the pool, or all columns."""
    unit = F.normalize(pool[0], dim=1)
    calls = {
        "mts_fast, all features": lambda: distribution_features(*pool),
        "mts_fast, neighbours": lambda: neighbor_statistics(*pool).similarity,
        "torch tiles + topk": lambda: torch_tiles(*pool),
        "reference backend": lambda: with_reference(pool),
        "full matrices": lambda: reference.distribution_features(*pool),
    }
    if importlib.util.find_spec("faiss"):
        calls[BASE] = lambda: faiss_search(unit.numpy(), threads)
    return {
        label: call for label, call in calls.items() if len(unit) <= LARGEST.get(label, len(unit))
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("size", "dimension"), SIZES)
def bench_neighbor_statistics(benchmark, size, dimension, threads):
    pool = make_pool(size, dimension)
    rounds = 2 if size > 16384 else 5
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        calls = implementations(pool, threads)
        memory = {label: peak_resident_bytes(call) for label, call in calls.items()}
        check(calls)
        seconds = {}
        benchmark.pedantic(lambda: seconds.update(interleaved(calls, rounds)), rounds=1)
    finally:
        torch.set_num_threads(before)
    base = BASE if BASE in calls else "torch tiles + topk"
    median = sorted(seconds["mts_fast, neighbours"])[rounds // 2]
    benchmark.extra_info |= {
        "N": size,
        "D": dimension,
        "threads": threads,
        "ratios": {label: round(r, 3) for label, r in ratios(seconds, base).items()},
        # each pair once: N (N - 1) / 2 products of D multiplications and additions
        "useful_gflops": round(size * (size - 1) * dimension / median / 1e9, 1),
        "seconds": round(median, 3),
        "peak_mib": {label: round(peak / 2**20) for label, peak in memory.items()},
    }


def check(calls):
    expected = calls["mts_fast, neighbours"]()
    columns = calls["mts_fast, all features"]()
    for label, call in calls.items():
        result = call()
        if isinstance(result, torch.Tensor):
            assert (result - expected).abs().max() < ALLOWED, label
            continue
        for name, column in columns.items():
            # ranks may swap where distances tie to the last digit
            allowed = 1e-3 if "percentile" in name or "agreement" in name else ALLOWED
            wrong = (result[name] - column).abs().max(1).values > allowed
            assert wrong.float().mean() < 1e-3, (label, name)
