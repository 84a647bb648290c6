"""FeatureTable in memory: columns, their order, standardisation, and refused arguments."""

import pytest
import torch
from feature_tables import assert_same, columns

from mts_fast.features import PAPER_COLUMNS, FeatureTable


def test_a_table_does_not_follow_the_tensors_it_was_given():
    """A table that shared memory with them would keep the moments of other values."""
    tensors = columns()
    table, other = FeatureTable(tensors), FeatureTable(columns())
    for value in tensors.values():
        value.zero_()
    assert_same(table, other)


def test_paper_columns_have_width_thirteen():
    widths = {"real_nearest3_cosine": 3, "synthetic_nearest3_cosine": 3}
    table = FeatureTable({n: torch.randn(7, widths.get(n, 1)) for n in PAPER_COLUMNS})
    assert table.standardized(PAPER_COLUMNS).shape == (7, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_moments(dtype):
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(200, 3, generator=g, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e3]) + 5
    standardized = FeatureTable({"x": raw.to(dtype)}).standardized()
    exact = raw.to(dtype).double()
    expected = (exact - exact.mean(0)) / exact.std(0, correction=0)
    # 5 with a deviation of 1e-3 loses 4 digits: observed 5e-5 and 9e-13
    torch.testing.assert_close(
        standardized.double(), expected, rtol=0, atol=1e4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])  # 0.1 and 1e6 have a sum that rounds
def test_constant_columns_become_zero(value):
    table = FeatureTable({"c": torch.full((9, 2), value), "x": torch.arange(9.0)})
    standardized = table.standardized(["c"])
    assert torch.equal(standardized, torch.zeros(9, 2))
    assert table.standardized(["x"])[:, 0].std(correction=0).item() == pytest.approx(1)


def test_replaced_columns_have_new_moments():
    table = FeatureTable({"x": torch.arange(4.0)})
    table.update({"x": torch.tensor([0.0, 0.0, 2.0, 2.0])})
    assert table.standardized().flatten().tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_other_samples_are_standardised_by_the_pool():
    pool = FeatureTable({"x": torch.tensor([1.0, 3.0, 5.0]), "c": torch.ones(3)})
    new = FeatureTable({"x": torch.tensor([3.0, 9.0]), "c": torch.tensor([1.0, 7.0])})
    deviation = (8 / 3) ** 0.5
    # an entry that is constant in the pool says nothing
    expected = torch.tensor([[0.0, 0.0], [6 / deviation, 0.0]])
    assert torch.allclose(new.standardized(pool=pool), expected)
    assert torch.equal(pool.standardized(pool=pool), pool.standardized())
    other = FeatureTable({"x": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="pool must be of width 1 in column 'x', got 2"):
        new.standardized(["x"], pool=other)


NAN = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1.0] * 7, TypeError, "column 'x' must be a tensor"),
        (torch.arange(7), TypeError, "column 'x' must be a floating-point"),
        (torch.ones(6), ValueError, "column 'x' must be of length 7"),
        (torch.ones(7, 1, 1), ValueError, r"column 'x' must be \[N\] or \[N, width\]"),
        (torch.ones(0), ValueError, r"column 'x' must be \[N\] or \[N, width\]"),
        (torch.ones(7, 0), ValueError, r"column 'x' must be \[N\] or \[N, width\]"),
        (torch.ones(7).to_sparse(), TypeError, "column 'x' must be a dense tensor"),
        (torch.ones(7, device="meta"), ValueError, "column 'x' must be on cpu like the table's"),
        (NAN, ValueError, r"column 'x' must be finite, got NaN or infinity in 2 rows \(1, 3\)"),
    ],
)
def test_refused_columns_leave_the_table_as_it_was(bad, error, message):
    table, expected = FeatureTable(columns()), FeatureTable(columns())
    with pytest.raises(error, match=f"FeatureTable: {message}"):
        table.update({"fine": torch.ones(7), "x": bad})
    assert_same(table, expected)


def test_lengths_are_compared_within_one_update():
    with pytest.raises(ValueError, match="column 'b' must be of length 3"):
        FeatureTable({"a": torch.ones(3), "b": torch.ones(4)})


def test_unknown_and_no_columns():
    table = FeatureTable(columns())
    with pytest.raises(KeyError, match=r"column must be one of \['loss', .*got 'x'"):
        table["x"]
    with pytest.raises(KeyError, match="column must be one of"):
        table.standardized(["loss", "x"])
    for call in (table.raw, table.standardized):
        with pytest.raises(ValueError, match="names must be at least one column"):
            call([])
    assert "x" not in table and table.get("x") is None
    assert FeatureTable().num_samples == 0


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ([("x", torch.ones(2))], TypeError, "columns must be a mapping, got list"),
        (torch.ones(2), TypeError, "columns must be a mapping, got a float32 tensor"),
        ({3: torch.ones(2)}, TypeError, "columns' names must be strings, got int 3"),
        ({"\ud800": torch.ones(2)}, ValueError, "columns' names must be text that can be saved"),
        ({"x": torch.ones(2, device="meta")}, ValueError, "on a device that holds values"),
    ],
)
def test_refused_mappings(columns, error, message):
    with pytest.raises(error, match=f"FeatureTable: .*{message}"):
        FeatureTable(columns)


def test_a_lone_name_is_not_read_letter_by_letter():
    table = FeatureTable(columns())
    for call in (table.raw, table.standardized, table.missing):
        with pytest.raises(TypeError, match="names must be a sequence of names, got str 'loss'"):
            call("loss")


# squares below float32's eps, then squares that under- or overflow in their dtype; at 2e4 and 5e307
# the sum overflows, too.
SCALES = [
    (torch.float32, 1e-6),
    (torch.float32, 1e-30),
    (torch.float32, 1e30),
    (torch.float16, 2e4),
    (torch.float64, 1e-300),
    (torch.float64, 5e307),
]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_numbers_of_any_size_are_standardized(dtype, scale):
    raw = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    column = (raw * scale).to(dtype)
    standardized = FeatureTable({"x": column}).standardized().flatten()
    assert standardized.dtype == dtype
    # the exact values in units of the scale, from the rounded column
    exact = column.double() / scale
    expected = (exact - exact.mean()) / exact.std(correction=0)
    atol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(standardized.double(), expected, rtol=0, atol=atol)


def test_rounding_noise_is_constant_and_what_is_above_it_is_not():
    one = torch.ones(8)
    noise, signal = one.clone(), one.clone()
    noise[::2] += torch.finfo(torch.float32).eps
    signal[::2] += 8 * torch.finfo(torch.float32).eps
    table = FeatureTable({"noise": noise, "signal": signal})
    assert torch.equal(table.standardized(["noise"]), torch.zeros(8, 1))
    assert table.standardized(["signal"]).flatten().tolist() == [1.0, -1.0] * 4
