"""FeatureTable.load of truncated, foreign, corrupted and older files."""

import json

import pytest
import safetensors.torch
import torch
from feature_tables import assert_same, columns

from mts_fast.features import FeatureTable


@pytest.mark.parametrize("end", [0, 4, 100, -1])  # empty; half a header; no data; one byte short
def test_truncated_file(end, tmp_path):
    path = tmp_path / "t.safetensors"
    FeatureTable(columns()).save(path)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=r"FeatureTable: file .* must be a complete safetensors"):
        FeatureTable.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])  # no metadata; another library's
def test_foreign_file(metadata, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"must be of format mts_fast\.FeatureTable/2"):
        FeatureTable.load(path)


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
            # NaN and infinity have an error of their own
            message = "data of another checksum|must be of columns that fit a table"
            with pytest.raises(ValueError, match=f"file '.*t.safetensors'.*({message})"):
                FeatureTable.load(path)
            continue
        try:
            loaded = FeatureTable.load(path)
        except ValueError as error:
            assert str(error).startswith(f"FeatureTable: file '{path}' must be ")
        else:
            assert_same(loaded, table)


def old_file(path, tensors, **metadata):
    """A file of format 1, which has no checksums."""
    metadata = {"format": "mts_fast.FeatureTable/1"} | metadata
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def test_old_files_load(tmp_path):
    raw_columns = {"loss": torch.rand(5, 1), "cosines": torch.rand(5, 3)}
    tensors = {f"column/{n}": v for n, v in raw_columns.items()}
    tensors |= {f"moments/{n}": torch.rand(2, v.shape[1]) for n, v in raw_columns.items()}
    old_file(tmp_path / "t.safetensors", tensors, order=json.dumps(list(raw_columns)))
    assert_same(FeatureTable.load(tmp_path / "t.safetensors"), FeatureTable(raw_columns))


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
