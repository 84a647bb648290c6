"""What ranks of a pool run to compute features."""

import sys

import torch
import torch.distributed as dist
from rank_jobs import part
from searched_pools import clusters

from mts_fast.distributed import distribution_features
from mts_fast.features import Approximate


def pool(size, dtype):
    """Embeddings, labels and flags."""
    g = torch.Generator().manual_seed(size)
    labels = torch.randint(3, (size,), generator=g) * 5
    x = torch.randn(size, 7, generator=g, dtype=torch.float64) + labels[:, None] / 5
    x[::11] = 0.0  # zero vectors
    return x.to(dtype), labels, torch.rand(size, generator=g) < 0.5


def tied(size):
    """Samples that are equal in fours, so that numbers decide."""
    x = torch.eye(4, dtype=torch.float64)[torch.arange(size) % 4] + 0.1
    return x, torch.arange(size) % 2, torch.arange(size) % 6 < 3


def mine(group, parts, sizes):
    return [part(p, sizes, dist.get_rank(group)) for p in parts]


def columns(group, sizes, dtype):
    parts = mine(group, pool(sum(sizes), dtype), sizes)
    return distribution_features(*parts, small_class="pad", process_group=group)


def columns_of_ties(group, sizes):
    return distribution_features(
        *mine(group, tied(sum(sizes)), sizes), neighbors=3, process_group=group
    )


def approximately(group, sizes, options):
    """(columns, notes) of an approximate search."""
    parts = mine(group, clusters(sum(sizes)), sizes)
    state = torch.get_rng_state()
    columns = distribution_features(*parts, search=Approximate(**options), process_group=group)
    assert torch.equal(torch.get_rng_state(), state)
    return dict(columns), columns.notes


def text_of(call):
    try:
        call()
    except Exception as error:
        return str(error)
    return "no error"


def bad_rows(group):
    x, y, s = mine(group, pool(60, torch.float32), (20, 20, 20))
    if dist.get_rank(group) == 1:
        x[3] = torch.nan
    return text_of(lambda: distribution_features(x, y, s, small_class="pad", process_group=group))


def without_faiss(group, sizes):
    """On rank 1 alone."""
    parts = mine(group, clusters(sum(sizes)), sizes)
    before = sys.modules.get("faiss")
    if dist.get_rank(group) == 1:
        sys.modules["faiss"] = None
    search = Approximate(exact_below=0)
    text = text_of(lambda: distribution_features(*parts, search=search, process_group=group))
    sys.modules.pop("faiss", None)
    if before is not None:
        sys.modules["faiss"] = before
    return text


def other_seeds(group, sizes):
    """An option of the search that differs."""
    parts = mine(group, clusters(sum(sizes)), sizes)
    search = Approximate(seed=dist.get_rank(group))
    return text_of(lambda: distribution_features(*parts, search=search, process_group=group))


def other_options(group):
    parts = mine(group, pool(60, torch.float32), (20, 20, 20))
    k = 3 - (dist.get_rank(group) == 2)
    return text_of(lambda: distribution_features(*parts, k=k, process_group=group))


def small_classes(group):
    x, y, s = mine(group, pool(60, torch.float32), (20, 20, 20))
    return text_of(lambda: distribution_features(x, y, s | True, process_group=group))
