"""FeatureTable: what goes in comes out, also from disk, and a failed save loses nothing."""

import os

import pytest
import safetensors.torch
import torch
from comparison import assert_bitwise

from mts_fast.features import PAPER_COLUMNS, FeatureTable


def columns(n=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "loss": torch.rand(n, 1, generator=g, dtype=dtype) * 5,
        "cosines": torch.randn(n, 3, generator=g, dtype=dtype),
        "a_later_name": torch.randn(n, generator=g, dtype=dtype),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert_bitwise(dict(found), dict(expected))
    assert_bitwise(found.standardized(), expected.standardized())


# float32 is usual; float64 and half precision must not be converted on the way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_bitwise(dtype, tmp_path):
    table = FeatureTable(columns(dtype=dtype))
    table.save(tmp_path / "pool.safetensors")
    found = FeatureTable.load(str(tmp_path / "pool.safetensors"))
    assert_same(found, table)
    assert found.num_samples == 7 and found["loss"].dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]


def test_awkward_columns_are_saved(tmp_path):
    """Views, a transposed tensor, one tensor under two names, and one that is no leaf."""
    base = torch.randn(7, 6)
    parameter = torch.nn.Parameter(torch.randn(7))
    given = {
        "slice": base[:, 2:4],
        "transposed": torch.randn(2, 7).T,
        "first": base[:, 0],
        "again": base[:, 0],
        "learned": parameter * 2,
    }
    table = FeatureTable(given)
    table.save(tmp_path / "t.safetensors")
    found = FeatureTable.load(tmp_path / "t.safetensors")
    assert_same(found, table)
    for name, value in given.items():
        assert torch.equal(found[name], value.detach().view(7, -1))


def test_a_table_does_not_follow_the_tensors_it_was_given():
    """Its moments would no longer be those of its columns."""
    given = columns()
    table, other = FeatureTable(given), FeatureTable(columns())
    for value in given.values():
        value.zero_()
    assert_same(table, other)


def test_order_is_that_of_adding_or_of_asking(tmp_path):
    table = FeatureTable(columns())
    table.update({"loss": torch.arange(7.0)})  # replaced in place
    table.update({"first": torch.ones(7)})
    assert list(table) == ["loss", "cosines", "a_later_name", "first"]
    parts = [table[name] for name in table]
    assert torch.equal(table.raw(), torch.cat(parts, dim=1))
    assert torch.equal(table.raw(["first", "loss"]), torch.cat([parts[3], parts[0]], dim=1))
    assert torch.equal(table["a_later_name"], columns()["a_later_name"][:, None])
    table.save(tmp_path / "t.safetensors")
    assert list(FeatureTable.load(tmp_path / "t.safetensors")) == list(table)


def test_resume_computes_what_is_missing(tmp_path):
    path = tmp_path / "t.safetensors"
    FeatureTable({"gradient_norm": torch.rand(7), "loss": torch.rand(7)}).save(path)
    table = FeatureTable.load(path)
    missing = table.missing()
    assert missing == [name for name in PAPER_COLUMNS if name != "gradient_norm"]
    assert table.missing(["loss", "x"]) == ["x"]
    table.update({name: torch.rand(7) for name in missing})
    assert table.missing() == []
    table.save(path)
    assert_same(FeatureTable.load(path), table)


def test_paper_columns_have_width_thirteen():
    widths = {"real_nearest3_cosine": 3, "synthetic_nearest3_cosine": 3}
    table = FeatureTable({n: torch.randn(7, widths.get(n, 1)) for n in PAPER_COLUMNS})
    assert table.standardized(PAPER_COLUMNS).shape == (7, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized_moments(dtype):
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(200, 3, generator=g, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e3]) + 5
    found = FeatureTable({"x": raw.to(dtype)}).standardized()
    exact = raw.to(dtype).double()
    expected = (exact - exact.mean(0)) / exact.std(0, correction=0)
    # 5 with a deviation of 1e-3 loses 4 digits: observed 5e-5 and 9e-13
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])  # 0.1 and 1e6 have a sum that rounds
def test_constant_columns_become_zero(value):
    table = FeatureTable({"c": torch.full((9, 2), value), "x": torch.arange(9.0)})
    found = table.standardized(["c"])
    assert torch.equal(found, torch.zeros(9, 2))
    assert table.standardized(["x"])[:, 0].std(correction=0).item() == pytest.approx(1)


def test_replaced_columns_have_new_moments():
    table = FeatureTable({"x": torch.arange(4.0)})
    table.update({"x": torch.tensor([0.0, 0.0, 2.0, 2.0])})
    assert table.standardized().flatten().tolist() == [-1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("at", ["writing", "moving"])  # the two moments at which it can break
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_failed_save_keeps_the_old_file(error, at, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    old = FeatureTable(columns())
    old.save(path)
    before = path.read_bytes()

    def half_written(tensors, file, metadata):
        with open(file, "wb") as out:
            out.write(b"half")
        raise error

    def failing(source, target):
        raise error

    if at == "writing":
        monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(type(error)):
        FeatureTable({"x": torch.ones(3)}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    monkeypatch.undo()
    assert_same(FeatureTable.load(path), old)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])  # nothing; half a header; no data; one byte less
def test_truncated_file(kept, tmp_path):
    path = tmp_path / "t.safetensors"
    FeatureTable(columns()).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"FeatureTable: file .* must be a complete safetensors"):
        FeatureTable.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])  # without any; of another library
def test_foreign_file(metadata, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"must be of format mts_fast\.FeatureTable/1"):
        FeatureTable.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="FeatureTable: path must be an existing file"):
        FeatureTable.load(tmp_path / "none.safetensors")


NAN = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1.0] * 7, TypeError, "column 'x' must be a tensor"),
        (torch.arange(7), TypeError, "column 'x' must be a floating-point"),
        (torch.ones(6), ValueError, "column 'x' must be of length 7"),
        (torch.ones(7, 1, 1), ValueError, r"column 'x' must be \[N\] or \[N, width\]"),
        (torch.ones(0), ValueError, r"column 'x' must be \[N\] or \[N, width\]"),
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


def test_permissions_are_those_of_other_files(tmp_path):
    """safetensors itself writes files that only their owner can read."""
    path = tmp_path / "table.safetensors"
    (tmp_path / "other").touch()
    table = FeatureTable({"loss": torch.ones(2)})
    table.save(path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    os.chmod(path, 0o640)
    table.save(path)
    assert path.stat().st_mode & 0o777 == 0o640
