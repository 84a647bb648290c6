"""Distribution features by approximate search, over exact search: time, recall, error of columns.

The pools look like an encoder's embeddings: each class has several clusters of its own directions,
whose lengths fall off as 1 / sqrt(rank), over noise of full rank. The error of a column is its mean
absolute difference from the exact one, over the whole pool. Classes of at least EXACT_BELOW samples
are searched approximately, too; the option's default is larger, for the reason that the smallest
pools show.
"""

import pytest
import torch
from measure import ratios

from mts_fast.features import Approximate, distribution_features
from mts_fast.tuning.timing import interleaved

DIMENSION, CLUSTERS = 256, 20
EXACT_BELOW = 10_000
# (N, classes): ten classes that are compared exactly, up to a pool where the search pays; two
# classes that are searched
POOLS = ((20_000, 10), (60_000, 10), (60_000, 2), (200_000, 10))
RECALL = (0.95, 0.99)
# larger pools take minutes
ROUNDS_BELOW, ROUNDS = 100_000, 3
AGREEMENT, NEAREST = "knn5_weighted_label_agreement", "real_nearest3_cosine"


def pool(size, classes):
    """Embeddings, labels of which a twentieth are wrong, and flags."""
    g = torch.Generator().manual_seed(0)
    cluster = torch.randint(classes * CLUSTERS, (size,), generator=g)
    labels = cluster % classes
    lengths = torch.arange(1, DIMENSION + 1).rsqrt()
    centers = 2 * torch.randn(classes * CLUSTERS, DIMENSION, generator=g) * lengths
    x = torch.randn(size, DIMENSION, generator=g) * lengths
    for c in range(classes):
        rotation = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=g)).Q
        chosen = labels == c
        x[chosen] = (x[chosen] + centers[cluster[chosen]]) @ rotation
    wrong = torch.randperm(size, generator=g)[: size // 20]
    labels[wrong] = torch.randint(classes, (len(wrong),), generator=g)
    return x, labels, torch.rand(size, generator=g) < 0.5


@pytest.mark.parametrize("recall", RECALL)
@pytest.mark.parametrize(("size", "classes"), POOLS)
def bench_approximate_features(benchmark, size, classes, recall):
    parts = pool(size, classes)
    search = Approximate(recall=recall, exact_below=EXACT_BELOW)
    exact = distribution_features(*parts)
    approximate = distribution_features(*parts, search=search)
    errors = {name: (approximate[name] - exact[name]).abs().mean().item() for name in exact}
    for name, note in approximate.notes.items():
        # the sample says what the whole pool has; its standard error is below 0.01
        assert abs(errors[name] - note["mean_error"]) < 0.01
    assert all(error == 0 for name, error in errors.items() if name not in approximate.notes)
    calls = {
        "exact": lambda: distribution_features(*parts),
        "approximate": lambda: distribution_features(*parts, search=search),
    }
    seconds = {}
    rounds = ROUNDS if size < ROUNDS_BELOW else 1
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, rounds)), rounds=1)
    benchmark.extra_info |= {
        "N": size,
        "D": DIMENSION,
        "classes": classes,
        "asked": recall,
        "threads": torch.get_num_threads(),
        "ratios": {label: round(r, 3) for label, r in ratios(seconds, "exact").items()},
        "recall": {name: approximate.notes[name]["recall"] for name in (AGREEMENT, NEAREST)},
        "error": {name: float(f"{errors[name]:.2g}") for name in (AGREEMENT, NEAREST)},
        "search": approximate.notes[AGREEMENT]["search"],
    }
