"""class_centroids and percentile_rank: every backend against a loop over the classes."""

import pytest
import torch
from comparison import assert_bitwise
from pools import lonely_sample, many, no_real_sample, pool

from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import ClassCentroids, class_centroids_, percentile_rank
from mts_fast.reference import class_median

needs_cpp = pytest.mark.skipif(not extension().available, reason=extension().reason)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 40, 1000])  # chunks of one; with a remainder; of all
@pytest.mark.parametrize("make", [many, lonely_sample, no_real_sample])
def test_centroids(make, size, dtype, backend):
    x, y, s = make()
    x = x.to(dtype)
    centroids = ClassCentroids.empty(9, x.shape[1], CPU)
    for part in torch.arange(len(x)).split(size):
        class_centroids_(centroids, x[part], y[part].int(), s[part].byte())
    for c in range(9):
        for sources, chosen in ((slice(0, 1), ~s), (slice(1, 2), s), (slice(0, 2), s | ~s)):
            members = x.double()[(y == c) & chosen]
            expected = members.mean(0) if len(members) else torch.zeros(x.shape[1])
            # float64 sums of 20 terms; observed 2e-16
            torch.testing.assert_close(
                centroids.mean(sources)[c], expected.double(), rtol=0, atol=1e-15
            )
    assert centroids.counts.sum() == len(x)


def test_large_classes_keep_their_digits(backend):
    """A million equal numbers: a sum in float32 would lose digits."""
    x = torch.full((1_000_000, 1), 33.1)
    zeros = torch.zeros(len(x), dtype=torch.int64)
    centroids = ClassCentroids.empty(1, 1, CPU)
    class_centroids_(centroids, x, zeros, zeros)
    assert abs(centroids.mean(slice(0, 1)).item() - x[0].item()) < 1e-8


def test_centroids_of_views(backend):
    x, y, s = many()
    result, expected = (ClassCentroids.empty(7, 16, CPU) for _ in range(2))
    class_centroids_(result, x.T.contiguous().T, torch.stack([y, y], 1)[:, 0], s)
    class_centroids_(expected, x, y, s)
    assert_bitwise(vars(result), vars(expected))


def ranks(values, labels):
    out = []
    for i, value in enumerate(values):
        mine = [(v, j) for j, v in enumerate(values) if labels[j] == labels[i]]
        out.append(sorted(mine).index((value, i)) / max(len(mine) - 1, 1))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# one value; many ties in few classes; some classes empty; more classes than values.
@pytest.mark.parametrize(("size", "classes"), [(1, 1), (60, 2), (97, 30), (20, 100)])
def test_ranks(size, classes, dtype, backend):
    g = torch.Generator().manual_seed(size)
    values = torch.randint(-8, 8, (size,), generator=g).to(dtype) / 4
    labels = torch.randint(classes, (size,), generator=g)
    expected = torch.tensor(ranks(values.tolist(), labels.tolist()), dtype=dtype)
    # one division; observed 0
    torch.testing.assert_close(percentile_rank(values, labels), expected, rtol=1e-7, atol=0)
    medians = [sorted(values[labels == c].tolist()) for c in labels]
    lower = [m[(len(m) - 1) // 2] for m in medians]
    assert class_median(values, labels).tolist() == lower


def test_names_of_classes_cost_nothing(backend):
    """Class numbers may be far apart: a table over their whole range would take terabytes."""
    values, labels = torch.randn(50), torch.randint(3, (50,))
    far = 10**12 * labels + 7
    assert_bitwise(percentile_rank(values, far), percentile_rank(values, labels))
    assert_bitwise(class_median(values, far), class_median(values, labels))


def test_ranks_of_views_and_of_nothing(backend):
    values, labels = torch.randn(50), torch.randint(3, (50,))
    strided = torch.stack([values, -values], 1)[:, 0]
    assert_bitwise(percentile_rank(strided, labels.byte()), percentile_rank(values, labels))
    assert percentile_rank(values[:0], labels[:0]).shape == (0,)


@needs_cpp
def test_schemas():
    x, y, s = pool(20, 4, 2)
    centroids = ClassCentroids.empty(2, 4, CPU)
    arguments = (x, y, s, centroids.sums, centroids.counts)
    torch.library.opcheck(torch.ops.mts_fast.class_centroids_.default, arguments)
    torch.library.opcheck(torch.ops.mts_fast.percentile_rank.default, (x[:, 0], y, 2))


def test_errors_name_the_argument():
    x, y, s = pool(20, 4, 2)
    with pytest.raises(ValueError, match=r"class_centroids: embeddings must be \[n, 3\], as the"):
        class_centroids_(ClassCentroids.empty(2, 3, CPU), x, y, s)
    with pytest.raises(ValueError, match=r"class_centroids: labels must be in \[0, 1\)"):
        class_centroids_(ClassCentroids.empty(1, 4, CPU), x, y, s)
    with pytest.raises(ValueError, match="class_centroids: is_synthetic must be of length 20"):
        class_centroids_(ClassCentroids.empty(2, 4, CPU), x, y, s[:3])
    with pytest.raises(ValueError, match="percentile_rank: labels must be of length 20"):
        percentile_rank(x[:, 0], y[:3])
    with pytest.raises(ValueError, match=r"percentile_rank: values must be finite.*\(4\)"):
        percentile_rank(x[:, 0].index_fill(0, torch.tensor([4]), torch.inf), y)
    with pytest.raises(TypeError, match="percentile_rank: labels must be an integer"):
        percentile_rank(x[:, 0], y.float())
