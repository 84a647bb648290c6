"""FeatureTable: what goes in comes out, also from disk, and a failed save loses nothing."""

import json
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
    with pytest.raises(ValueError, match=r"must be of format mts_fast\.FeatureTable/2"):
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


def test_a_lone_name_is_not_taken_letter_by_letter():
    table = FeatureTable(columns())
    for call in (table.raw, table.standardized, table.missing):
        with pytest.raises(TypeError, match="names must be a sequence of names, got str 'loss'"):
            call("loss")


# squares vanish in float32; differences at the last places; overflow in half and single precision,
# and in double; the smallest numbers that there are.
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
    found = FeatureTable({"x": column}).standardized().flatten()
    assert found.dtype == dtype
    # the truth in units of the scale, from the numbers as they were rounded
    exact = column.double() / scale
    expected = (exact - exact.mean()) / exact.std(correction=0)
    atol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def test_rounding_noise_is_constant_and_what_is_above_it_is_not():
    one = torch.ones(8)
    noise, signal = one.clone(), one.clone()
    noise[::2] += torch.finfo(torch.float32).eps
    signal[::2] += 8 * torch.finfo(torch.float32).eps
    table = FeatureTable({"noise": noise, "signal": signal})
    assert torch.equal(table.standardized(["noise"]), torch.zeros(8, 1))
    assert table.standardized(["signal"]).flatten().tolist() == [1.0, -1.0] * 4


def test_equal_tables_give_equal_bytes(tmp_path):
    """Also of columns that lie otherwise in memory; another order is another table."""
    given = columns()
    FeatureTable(given).save(tmp_path / "a.safetensors")
    given["cosines"] = given["cosines"].T.contiguous().T
    FeatureTable(given).save(tmp_path / "b.safetensors")
    FeatureTable(dict(reversed(given.items()))).save(tmp_path / "c.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_every_flipped_bit_of_the_data_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    table = FeatureTable({"x": torch.rand(3), "y": torch.rand(3, 2)})
    table.save(path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        if bit // 8 >= begin:
            # NaN and infinity are refused for what they are
            message = "data of another checksum|must be of columns that fit a table"
            with pytest.raises(ValueError, match=f"file '.*t.safetensors'.*({message})"):
                FeatureTable.load(path)
            continue
        try:
            found = FeatureTable.load(path)
        except ValueError as error:
            assert str(error).startswith(f"FeatureTable: file '{path}' must be ")
        else:
            assert_same(found, table)


def old_file(path, tensors, **metadata):
    """A file as it was before there were checksums."""
    metadata = {"format": "mts_fast.FeatureTable/1"} | metadata
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def test_old_files_load(tmp_path):
    given = {"loss": torch.rand(5, 1), "cosines": torch.rand(5, 3)}
    tensors = {f"column/{n}": v for n, v in given.items()}
    tensors |= {f"moments/{n}": torch.rand(2, v.shape[1]) for n, v in given.items()}
    old_file(tmp_path / "t.safetensors", tensors, order=json.dumps(list(given)))
    assert_same(FeatureTable.load(tmp_path / "t.safetensors"), FeatureTable(given))


ONE = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"x": ONE}, {}, "of readable metadata"),
        ({"x": ONE}, {"order": "[x"}, "of readable metadata"),
        ({"x": ONE}, {"order": "[" * 100_000}, "of readable metadata"),
        ({"x": ONE}, {"order": "3"}, "of metadata that name its columns"),
        ({"x": ONE}, {"order": '["x", "x"]'}, "of metadata that name its columns"),
        ({"x": ONE}, {"order": "[[0]]"}, "of metadata that name its columns"),
        ({"x": ONE}, {"order": '["y"]'}, "a complete safetensors file"),
        ({"x": ONE.int()}, {"order": '["x"]'}, "of columns that fit .* floating-point"),
        ({"x": ONE / 0}, {"order": '["x"]'}, r"of columns that fit .* 2 rows \(0, 1\)"),
        (
            {"x": ONE, "y": ONE[:1].clone()},
            {"order": '["x", "y"]'},
            "of columns that fit .* length 2",
        ),
        ({"x": ONE[None]}, {"order": '["x"]'}, r"of columns that fit .* \[N, width\]"),
    ],
)
def test_damaged_files_are_refused_by_name(tensors, metadata, message, tmp_path):
    path = tmp_path / "t.safetensors"
    old_file(path, {f"column/{n}": v for n, v in tensors.items()}, **metadata)
    with pytest.raises(
        ValueError, match=rf"FeatureTable: file '.*t\.safetensors' must be {message}"
    ):
        FeatureTable.load(path)


@pytest.mark.parametrize("text", ["3", "[]", "{}", '{"order": ["x"], "sha256": 5}'])
def test_damaged_metadata_of_a_new_file(text, tmp_path):
    path = tmp_path / "t.safetensors"
    metadata = {"mts_fast.FeatureTable/2": text}
    safetensors.torch.save_file({"column/x": ONE}, path, metadata=metadata)
    with pytest.raises(ValueError, match="must be of metadata that name its columns"):
        FeatureTable.load(path)


def test_what_is_no_file(tmp_path):
    table = FeatureTable(columns())
    for call in (table.save, FeatureTable.load):
        with pytest.raises(TypeError, match=r"FeatureTable: path must be a path \(str or pathlib"):
            call(None)
        with pytest.raises(ValueError, match="FeatureTable: path must be a path, got an empty"):
            call("")
    with pytest.raises(ValueError, match="must be a safetensors file, got the folder"):
        FeatureTable.load(tmp_path)
    with pytest.raises(ValueError, match=r"must be a safetensors file, got '.*', a device or"):
        FeatureTable.load(os.devnull)
    with pytest.raises(OSError, match="path must be of a file, or new, got the folder"):
        table.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_stay_and_devices_are_refused(tmp_path):
    table = FeatureTable(columns())
    (tmp_path / "real").mkdir()
    link, file = tmp_path / "link.safetensors", tmp_path / "real" / "t.safetensors"
    link.symlink_to(file)
    for _ in range(2):  # the file is new, then old
        table.save(link)
        assert link.is_symlink() and not file.is_symlink()
        assert_same(FeatureTable.load(link), table)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sink").symlink_to(os.devnull)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, what in (("pipe", "a device"), ("sink", "a device"), ("loop", "a link to itself")):
        with pytest.raises(OSError, match=f"path must be of a file, or new, got .*{name}', {what}"):
            table.save(tmp_path / name)
    names = ["link.safetensors", "loop", "pipe", "real", "sink"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["t.safetensors"]
