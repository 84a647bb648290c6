"""Pictures in one file, the same however they are read; what cannot be read is told as a whole."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from mts_fast.pipeline.decode import (
    UnreadableFiles,
    known_unreadable,
    open_pixels,
    pixels_key,
    remember_unreadable,
    scan,
    write_pixels,
)

RNG = np.random.default_rng(0)


@pytest.fixture
def paths(tmp_path):
    made = []
    for i, shape in enumerate([(8, 8), (16, 8), (8, 24), (4, 4), (9, 7)] * 20):
        path = tmp_path / f"{i}.png"
        Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
        made.append(path)
    return made


def test_workers_do_not_matter(paths, tmp_path):
    counted = []
    for workers in (0, 2):
        write_pixels(paths, 8, tmp_path / f"{workers}.npy", workers, counted.append)
    one, other = (open_pixels(tmp_path / f"{workers}.npy") for workers in (0, 2))
    assert one.shape == (100, 8, 8, 3) and np.array_equal(one, other) and sum(counted) == 200
    assert np.array_equal(one[0], np.asarray(Image.open(paths[0])))  # of its size already
    tall = np.asarray(Image.open(paths[1]))
    assert np.array_equal(one[1], tall[4:12])  # the middle


def test_what_is_no_picture_is_all_told_and_nothing_is_left(paths, tmp_path):
    paths[70].write_bytes(b"")
    paths[3].unlink()
    paths[99].write_bytes(paths[99].read_bytes()[:60])
    out = tmp_path / "out" / "pixels.npy"
    out.parent.mkdir()
    for workers in (0, 2):
        with pytest.raises(UnreadableFiles) as raised:
            write_pixels(paths, 8, out, workers, lambda _: None)
        assert raised.value.reasons.keys() == {3, 70, 99}
        assert raised.value.reasons[70] == "0 bytes" and "damaged" in raised.value.reasons[99]
        assert not list(out.parent.iterdir())


def test_a_scan_hashes_and_measures(paths):
    paths[3].unlink()
    counted = []
    scanned = scan(paths, counted.append)
    assert [one.side for one in scanned[:5]] == [8, 8, 8, None, 7] and sum(counted) == 100
    assert scanned[3].error == "cannot be opened: No such file or directory"
    assert scanned[0].sha256 == hashlib.sha256(paths[0].read_bytes()).hexdigest()


def test_unreadable_files_are_remembered_by_content(tmp_path):
    assert known_unreadable(tmp_path) == {}
    remember_unreadable(tmp_path, {"a": "0 bytes"})
    remember_unreadable(tmp_path, {"b": "damaged"})
    assert known_unreadable(tmp_path) == {"a": "0 bytes", "b": "damaged"}
    (tmp_path / "unreadable.json").write_text("{")
    assert known_unreadable(tmp_path) == {}


def test_the_key_is_of_content_and_size():
    keys = {pixels_key(h, s) for h in (["a", "b"], ["b", "a"], ["a"]) for s in (8, 16)}
    assert len(keys) == 6 and pixels_key(["a"], 8) == pixels_key(["a"], 8)
