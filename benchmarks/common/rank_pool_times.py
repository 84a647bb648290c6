"""Distribution features by one process and by ranks of one machine, with their processor time."""

import multiprocessing
import statistics
import tempfile
import time

import torch
import torch.distributed as dist

import mts_fast
from mts_fast.distributed import distribution_features

ROUNDS = 3


def pool(size, width):
    """Embeddings in float64, labels and flags."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (size,), generator=g)
    x = torch.randn(size, width, generator=g, dtype=torch.float64) + labels[:, None] / 5
    return x, labels, torch.rand(size, generator=g) < 0.5


def timed(call):
    """(result, median processor seconds); the first call is not counted."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        result = call()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def of_one(size, width):
    """By one thread of a process of its own, as each rank has."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(_alone, (size, width))


def of_ranks(size, width, ranks):
    """(columns of every rank, processor seconds of all)."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(size, width, rank, ranks, f"{folder}/store") for rank in range(ranks)]
        with multiprocessing.get_context("spawn").Pool(ranks) as processes:
            results = processes.starmap(_rank, arguments, chunksize=1)
    return [columns for columns, _ in results], sum(seconds for _, seconds in results)


def _alone(size, width):
    torch.set_num_threads(1)
    parts = pool(size, width)
    return timed(lambda: mts_fast.features.distribution_features(*parts))


def _rank(size, width, rank, ranks, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parts = [p.tensor_split(ranks)[rank] for p in pool(size, width)]
    return timed(lambda: distribution_features(*parts))
