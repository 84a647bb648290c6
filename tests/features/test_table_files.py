"""FeatureTable on disk: files load bitwise as saved, and a failed save loses nothing."""

import os

import pytest
import safetensors.torch
import torch
from feature_tables import assert_same, columns

from mts_fast.features import PAPER_COLUMNS, FeatureTable


# float32 is usual; float64 and half precision must not be converted on the way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_bitwise(dtype, tmp_path):
    table = FeatureTable(columns(dtype=dtype))
    table.save(tmp_path / "pool.safetensors")
    loaded = FeatureTable.load(str(tmp_path / "pool.safetensors"))
    assert_same(loaded, table)
    assert loaded.num_samples == 7 and loaded["loss"].dtype == dtype
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]


def test_awkward_columns_are_saved(tmp_path):
    """Views, a transposed tensor, one tensor under two names, and a non-leaf tensor."""
    base = torch.randn(7, 6)
    parameter = torch.nn.Parameter(torch.randn(7))
    tensors = {
        "slice": base[:, 2:4],
        "transposed": torch.randn(2, 7).T,
        "first": base[:, 0],
        "again": base[:, 0],
        "learned": parameter * 2,
    }
    table = FeatureTable(tensors)
    table.save(tmp_path / "t.safetensors")
    loaded = FeatureTable.load(tmp_path / "t.safetensors")
    assert_same(loaded, table)
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value.detach().view(7, -1))


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


@pytest.mark.parametrize("at", ["writing", "moving"])  # the two operations that can fail
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


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="FeatureTable: path must be an existing file"):
        FeatureTable.load(tmp_path / "none.safetensors")


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


def test_equal_tables_give_equal_bytes(tmp_path):
    """Strides do not change the bytes of a file; the order of the columns does."""
    tensors = columns()
    FeatureTable(tensors).save(tmp_path / "a.safetensors")
    tensors["cosines"] = tensors["cosines"].T.contiguous().T
    FeatureTable(tensors).save(tmp_path / "b.safetensors")
    FeatureTable(dict(reversed(tensors.items()))).save(tmp_path / "c.safetensors")
    a, b, c = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


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
