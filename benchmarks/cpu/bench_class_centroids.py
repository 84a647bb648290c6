"""class_centroids: the C++ kernel against index_add_, equal sums asserted first."""

import pytest
import torch

import mts_fast
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import ClassCentroids, class_centroids_

# an encoder's usual width; CIFAR's and ImageNet's numbers of classes
DIMENSION = 512
CLASSES = (10, 1000)
SIZE = 65_536


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def bench_class_centroids(benchmark, backend, classes):
    """Bytes that must move: the embeddings, labels and flags; the sums stay in cache."""
    if backend == "cpp" and not extension().available:
        pytest.skip(extension().reason)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, DIMENSION, generator=g)
    y = torch.randint(classes, (SIZE,), generator=g)
    s = torch.rand(SIZE, generator=g) < 0.5

    def run():
        centroids = ClassCentroids.empty(classes, DIMENSION, torch.device("cpu"))
        class_centroids_(centroids, x, y, s)
        return centroids

    with mts_fast.use_backend("reference"):
        expected = run()
    benchmark.group = f"class_centroids C={classes}"
    with mts_fast.use_backend(backend):
        torch.testing.assert_close(run().sums, expected.sums)
        benchmark.pedantic(run, rounds=15, warmup_rounds=2)
    moved = SIZE * (4 * DIMENSION + 8 + 1)
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
