"""Distribution features in chunks against the reference, on pools with special cases."""

import pytest
import torch
from comparison import assert_bitwise
from pools import POOLS, many, one_class, pool

from mts_fast import reference
from mts_fast.features import DistributionSweep, distribution_features

# chunks: one row; two sizes that divide no pool; the whole pool.
CHUNKS = (1, 7, 50, 1024)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("make", POOLS)
def test_chunks_equal_reference(make, chunk, device):
    x, y, s = (t.to(device) for t in make())
    columns = distribution_features(x, y, s, small_class="pad", chunk=chunk)
    expected = reference.distribution_features(x, y, s)
    assert list(columns) == list(expected)
    for name, column in expected.items():
        assert column.isfinite().all(), name
        # the matrix product may sum in another order for another chunk; observed 2e-16.
        torch.testing.assert_close(columns[name], column, rtol=0, atol=1e-14, msg=name)


@pytest.mark.parametrize(("k", "neighbors"), [(1, 1), (3, 5), (5, 22)])  # least, paper's, N - 1
def test_other_counts_equal_reference(k, neighbors, device):
    x, y, s = (t.to(device) for t in one_class())
    options = {"k": k, "neighbors": neighbors}
    columns = distribution_features(x, y, s, chunk=7, small_class="pad", **options)
    for name, column in reference.distribution_features(x, y, s, **options).items():
        torch.testing.assert_close(columns[name], column, rtol=0, atol=1e-14, msg=name)
    assert columns["real_nearest3_cosine"].shape == (23, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, device):
    x, y, s = (t.to(device) for t in pool(60, 8, 3, dtype=dtype))
    assert_bitwise(distribution_features(x, y, s), distribution_features(x.float(), y, s))


def test_class_numbers_may_be_far_apart(device):
    """Class numbers far apart, as in WordNet: a table indexed by them would take terabytes."""
    x, y, s = (t.to(device) for t in many())
    expected = distribution_features(x, y, s)
    assert_bitwise(distribution_features(x, 10**12 * y + 7, s), expected)
    y[5] = 10**15
    with pytest.raises(ValueError, match=r"in classes \[1000000000000000\]; pass small"):
        distribution_features(x, y, s)


def test_flags_and_labels_of_other_types(device):
    x, y, s = (t.to(device) for t in many())
    expected = distribution_features(x, y, s)
    assert_bitwise(distribution_features(x, y.to(torch.uint8), s.int()), expected)


def test_hand_computed_pool(device):
    """Two classes on the axes of a plane, every feature by hand."""
    x = torch.tensor(
        [[1.0, 0.0], [0.6, 0.8], [0.0, 2.0], [0.0, 1.0], [0.0, -1.0]],
        dtype=torch.float64,
        device=device,
    )
    y = torch.tensor([0, 0, 0, 1, 1], device=device)
    s = torch.tensor([False, False, True, False, True], device=device)
    columns = distribution_features(x, y, s, k=2, neighbors=2, small_class="pad")
    expected = {
        # real centroids (0.8, 0.4) and (0, 1); synthetic ones (0, 2) and (0, -1)
        "real_centroid_cosine": [0.8 / 0.8**0.5, 0.8 / 0.8**0.5, 0.4 / 0.8**0.5, 1.0, -1.0],
        "synthetic_centroid_cosine": [0.0, 0.8, 1.0, -1.0, 1.0],
        # joint centroids: along (1.6, 2.8), of length sqrt(10.4), and the origin: cosine 0
        "class_centroid_cosine": [1.6 / 10.4**0.5, 3.2 / 10.4**0.5, 2.8 / 10.4**0.5, 0.0, 0.0],
        "class_nearest_cosine": [0.6, 0.8, 0.8, -1.0, -1.0],
        # one other real sample: repeated; the real sample 3 has no other: 0
        "real_nearest3_cosine": [[0.6, 0.6], [0.6, 0.6], [0.8, 0.0], [0.0, 0.0], [-1.0, -1.0]],
        "synthetic_nearest3_cosine": [[0.0, 0.0], [0.8, 0.8], [0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]],
        # neighbours: 0: (1, 2 by tie), 1: (2, 3), 2: (3, 1), 3: (2, 1), 4: (0, 1 at -0.8)
        "knn5_label_agreement": [1.0, 0.5, 0.5, 0.0, 0.0],
        "knn5_weighted_label_agreement": [1.0, 0.5, 0.8 / 1.8, 0.0, 0.0],
    }
    for name, values in expected.items():
        column = torch.tensor(values, dtype=torch.float64, device=device).view(5, -1)
        # the weighted agreement has 1e-8 in its denominator; observed 1e-8
        torch.testing.assert_close(columns[name], column, rtol=0, atol=1e-7, msg=name)
    # distances to the class means (8/15, 14/15) and (0, 0), their lower medians, ranks of the gap
    rank = columns["distance_to_median_percentile"].flatten().tolist()
    mean = x[:3].mean(0)
    gap = (x[:3] - mean).norm(dim=1)
    gap = (gap - gap.sort().values[1]).abs()
    assert rank[:3] == [sorted(gap.tolist()).index(v) / 2 for v in gap.tolist()]
    assert rank[3:] == [0.0, 1.0]  # a tie, in order of index


X, Y, S = pool(24, 4, 2)
BOTH = torch.arange(24) % 4 < 2


def with_nan(rows):
    x = X.clone()
    x[rows, 1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), Y, S), {}, TypeError, "embeddings must be a floating"),
        ((X[0], Y, S), {}, ValueError, "embeddings must be 2-dim"),
        ((X, Y.float(), S), {}, TypeError, "labels must be an integer"),
        ((X, Y[:-1], S), {}, ValueError, "labels must be of length 24"),
        ((X, Y - 1, S), {}, ValueError, r"labels must be in \[0, .*number the classes from 0"),
        ((X, Y, S[:-1]), {}, ValueError, "is_synthetic must be of length 24"),
        ((X, Y, S.float()), {}, TypeError, "is_synthetic must be a bool or integer"),
        ((X, Y, S), {"k": 0}, ValueError, "k must be a positive int, got 0"),
        ((X, Y, S), {"chunk": True}, TypeError, "chunk must be a positive int"),
        ((X, Y, S), {"neighbors": 24}, ValueError, "neighbors must be below the pool size 24"),
        ((X[:0], Y[:0], S[:0]), {}, ValueError, "neighbors must be below the pool size 0"),
        ((X, Y, S), {"small_class": "drop"}, ValueError, "small_class must be one of"),
        ((with_nan([3, 7]), Y, S), {}, ValueError, r"infinity in 2 rows \(3, 7\); drop or repair"),
        (
            (with_nan(list(range(6))), Y, S),
            {},
            ValueError,
            r"6 rows \(0, 1, 2, 3, 4, ...\)",
        ),
        (
            (X, torch.arange(24) // 12, torch.arange(24) >= 12),
            {},
            ValueError,
            r"every class has real samples, got none in classes \[1\]; pass small_class='pad'",
        ),
        (
            (X, torch.arange(24) // 12, torch.arange(24) < 12),
            {},
            ValueError,
            r"every class has real samples, got none in classes \[0\]",
        ),
        (
            (X, torch.arange(24) % 2, BOTH),
            {"k": 6},
            ValueError,
            r"k must be below the real samples of every class, got 6 with \[6, 6\]",
        ),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"distribution_features: .*{message}"):
        distribution_features(*arguments, **options)


def test_largest_k_of_a_class_is_accepted():
    """k other samples of the source are enough: a class of 6 serves k = 5, and no padding shows."""
    labels = torch.arange(24) % 2
    columns = distribution_features(X, labels, BOTH, k=5)
    expected = reference.distribution_features(X, labels, BOTH, k=5)
    torch.testing.assert_close(
        columns["real_nearest3_cosine"], expected["real_nearest3_cosine"], rtol=0, atol=1e-14
    )
    real_rows = columns["real_nearest3_cosine"][~BOTH]
    assert (real_rows.diff(dim=1) < 0).all()


# squares vanish, or overflow, in the dtype that is computed in; half precision is computed in
# float32. Powers of two, so that the numbers themselves stay the same.
SCALES = [
    (torch.float16, 10),
    (torch.float32, -100),
    (torch.float32, 83),
    (torch.float32, 120),
    (torch.float64, -1000),
    (torch.float64, 664),
    (torch.float64, 1000),
]


@pytest.mark.parametrize(("dtype", "power"), SCALES)
def test_columns_do_not_depend_on_the_scale(dtype, power, device):
    x, y, s = (t.to(device) for t in pool(60, 8, 3, dtype=dtype))
    x[7] = 0  # has cosine 0 to everything at every scale
    scaled = (x.double() * 2.0**power).to(dtype)
    options = {"small_class": "pad", "chunk": 25}
    expected = distribution_features(x, y, s, **options)
    assert_bitwise(distribution_features(scaled, y, s, **options), expected)
    assert expected["class_nearest_cosine"][7] == 0


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-30), (torch.float64, 1e200)])
def test_reference_does_not_depend_on_the_scale(dtype, scale):
    x, y, s = pool(60, 8, 3)
    expected = reference.distribution_features(x, y, s)
    columns = reference.distribution_features((x * scale).to(dtype), y, s)
    # float32 rounds the cosines; observed 1.6e-7. Ranks are the same.
    for name, column in expected.items():
        torch.testing.assert_close(columns[name].double(), column, rtol=0, atol=1e-6, msg=name)


def test_rows_of_very_different_lengths():
    """Cosines depend on the directions alone, whatever the lengths."""
    x, y, s = pool(60, 8, 3)
    lengths = 10.0 ** torch.linspace(-150, 150, 60, dtype=torch.float64)
    columns = distribution_features(x * lengths[:, None], y, s, small_class="pad")
    expected = distribution_features(x, y, s, small_class="pad")
    for name in ("real_nearest3_cosine", "synthetic_nearest3_cosine", "class_nearest_cosine"):
        torch.testing.assert_close(columns[name], expected[name], rtol=0, atol=1e-14)


def test_distances_beyond_all_numbers_name_the_embeddings():
    """The distance of two finite embeddings overflows float64."""
    x = torch.full((8, 4), 1.7e308, dtype=torch.float64)
    x[1:2] *= -1
    message = r"the distance of embeddings .* must be finite, .* 2 rows \(0, 1\); divide all"
    with pytest.raises(ValueError, match=f"distribution_features: {message}"):
        distribution_features(x, torch.tensor([0, 0, *range(1, 7)]), S[:8], small_class="pad")


class Source:
    """A source whose rows do not match its shape."""

    shape = (24, 4)

    def __init__(self, make):
        self.make = make

    def __getitem__(self, rows):
        return self.make(X[rows])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (None, TypeError, "embeddings must be a tensor, got NoneType"),
        (X.tolist(), TypeError, "embeddings must be a tensor, got list"),
        (X.to_sparse(), TypeError, "embeddings must be a dense tensor"),
        (X.to(torch.float8_e4m3fn), TypeError, "embeddings must be a floating-point tensor"),
        (X.to("meta"), ValueError, "embeddings must be on a device that holds values"),
        (X.numpy().astype(object), TypeError, "embeddings must be an array of numbers, got dtype"),
        (
            Source(lambda x: x[1:]),
            ValueError,
            r"embeddings must be of shape \(24, 4\) in rows 0 to 23, got \(23, 4",
        ),
        (
            Source(lambda x: x[:, :3]),
            ValueError,
            r"embeddings must be of shape \(24, 4\) in rows 0 to 23, got",
        ),
        (Source(lambda x: x.long()), TypeError, "embeddings must be a floating"),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=f"distribution_features: {message}"):
        DistributionSweep(source, Y, S, small_class="pad")


def test_k_beyond_the_pool_is_refused_before_memory_is_asked_for():
    with pytest.raises(ValueError, match="k must be at most the pool size 24, got 1000000000"):
        distribution_features(X, Y, S, k=10**9, small_class="pad")


def sweep(**options):
    return DistributionSweep(X, Y, S, chunk=10, small_class="pad", **options)


def state_after(units):
    """State after some of 12 units: 3 for centroids, 6 pairs of chunks, 3 for distances."""
    part = sweep()
    for _ in zip(range(units), part.run(), strict=False):
        pass
    return part.state_dict()


@pytest.mark.parametrize("units", [0, 2, 7, 11, 12])
def test_every_state_can_be_loaded(units):
    resumed = sweep()
    resumed.load_state_dict(state_after(units))
    for _ in resumed.run():
        pass
    assert_bitwise(resumed.columns(), distribution_features(X, Y, S, chunk=10, small_class="pad"))


def edited(name, change):
    def edit(state):
        change(state[name])

    return edit


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            edited("progress", lambda t: t[0].fill_(13)),
            ValueError,
            r"progress'\] must be in \[0, 12",
        ),
        (
            edited("progress", lambda t: t[0].fill_(-1)),
            ValueError,
            r"progress'\] must be in \[0, 12",
        ),
        (edited("progress", lambda t: t[0].fill_(2)), ValueError, "must be of 20 samples, got"),
        (edited("progress", lambda t: t[1].fill_(9)), ValueError, "chunk must be 9, as in the"),
        (edited("lists/index", lambda t: t.fill_(24)), ValueError, r"must be in \[0, 24\)"),
        (edited("lists/index", lambda t: t[0].neg_()), ValueError, r"must be in \[0, 24\)"),
        (edited("lists/real", lambda t: t[3].fill_(torch.nan)), ValueError, "must be of cosines"),
        (edited("lists/similarity", lambda t: t[0].fill_(9)), ValueError, "must be of cosines"),
        (edited("cosines", lambda t: t[0].fill_(torch.inf)), ValueError, "must be of cosines"),
        (edited("distance", lambda t: t[5].fill_(torch.inf)), ValueError, r"finite, .* rows \(5\)"),
        (edited("centroids/sums", lambda t: t.fill_(torch.nan)), ValueError, "must be finite"),
        (edited("centroids/counts", lambda t: t.neg_()), ValueError, "must be of 24 samples"),
        (lambda state: state.pop("distance"), ValueError, "must be torch.float64 .*, got NoneType"),
        (lambda state: state.update(cosines=3), ValueError, "must be .*, got int 3; start afresh"),
        (lambda state: state.update(cosines=X), ValueError, r"must be .* got torch.* \(24, 4\)"),
    ],
)
def test_damaged_states_change_nothing(edit, error, message):
    state, other = state_after(7), sweep()
    before = other.state_dict()
    edit(state)
    with pytest.raises(error, match=f"distribution_features: .*{message}"):
        other.load_state_dict(state)
    assert_bitwise(other.state_dict(), before)
    with pytest.raises(TypeError, match="state must be a mapping, got NoneType"):
        other.load_state_dict(None)


def test_a_state_without_neighbors_is_not_that_of_a_finished_sweep():
    state = state_after(3)
    state["progress"][0] = 12
    with pytest.raises(ValueError, match=r"similarity'\] must be full after 12 units, got empty"):
        sweep().load_state_dict(state)


def test_no_unit_is_done_twice():
    """Neither by two runs at once, nor again after an interrupted one."""
    part = sweep()
    first, second = part.run(), part.run()
    next(first)
    next(second)
    with pytest.raises(
        RuntimeError, match=r"run\(\) must be alone, got 2 units done, .* 1; exhaust"
    ):
        next(first)
    broken = DistributionSweep(X.clone(), Y, S, chunk=10, small_class="pad")
    broken.source[15] = torch.nan
    with pytest.raises(ValueError, match=r"embeddings must be finite, .* 1 rows \(15\)"):
        list(broken.run())
    with pytest.raises(RuntimeError, match="a unit was cut short after 1; load the last state"):
        list(broken.run())
