"""Fashion-MNIST's files: where they are looked for, and damaged ones."""

import builtins
import gzip
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from mts_fast.demo.data import images
from mts_fast.demo.data.images import load_fashion


def test_missing_fashion_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be a folder with Fashion-MNIST"):
        load_fashion(str(tmp_path))


def test_fashion_is_looked_for_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FASHION_ROOTS", (str(tmp_path / "a"), str(tmp_path / "b")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion()
    message = str(caught.value)
    assert (
        f"got none in {tmp_path / 'a'}, {tmp_path / 'b'}, and no Hugging Face `datasets`" in message
    )
    for remedy in ("apt-get install dataset-fashion-mnist", "torchvision", "coloured-digits"):
        assert remedy in message


def test_fashion_by_hugging_face(tmp_path, monkeypatch):
    """`datasets` is asked where no folder has the files; what it raises is named."""
    monkeypatch.setattr(images, "FASHION_ROOTS", (str(tmp_path),))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    rows = {"image": [np.full((28, 28), 255, "u1"), np.zeros((28, 28), "u1")], "label": [3, 1]}
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name, split: rows
    monkeypatch.setitem(sys.modules, "datasets", library)
    train, test = load_fashion()
    assert train.images.shape == (2, 1, 14, 14) and train.labels.tolist() == [3, 1]
    assert train.images[0].eq(1).all() and not test.images[1].any()

    def offline(name, split):
        raise builtins.ConnectionError("no network")

    library.load_dataset = offline
    with pytest.raises(FileNotFoundError, match="and ConnectionError by `datasets`; on Debian"):
        load_fashion()


def test_the_usual_folders_are_tried_in_turn(fashion, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "FASHION_ROOTS", (str(tmp_path / "missing"), str(fashion)))
    assert len(load_fashion()[0]) == 210


def test_torchvisions_root(fashion, tmp_path):
    raw = tmp_path / "root" / "FashionMNIST"
    raw.mkdir(parents=True)
    (raw / "raw").symlink_to(fashion)
    assert len(load_fashion(str(tmp_path / "root"))[0]) == 210


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder of small sets in place of Fashion-MNIST; its pixel values count up."""
    for part, count in (("train", 210), ("t10k", 20)):
        images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_fashion_files_plain_and_compressed(fashion):
    train, test = load_fashion(str(fashion))
    assert train.images.shape == (210, 1, 14, 14) and len(test) == 20
    assert torch.equal(train.labels, torch.arange(210) % 10)
    first = torch.tensor([0, 1, 28, 29]).double().mean() / 255
    assert train.images[0, 0, 0, 0].item() == pytest.approx(first.item())


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (IMAGES, lambda data: data[:-1], "of 164656 bytes, for shape [210, 28, 28], got 164655"),
        (IMAGES, lambda data: data + b"x", "of 164656 bytes, for shape [210, 28, 28], got 164657"),
        (IMAGES, lambda data: data[:9], "a complete IDX file, got 9 bytes"),
        (IMAGES, lambda data: b"", "an IDX file of unsigned bytes, got other content"),
        (IMAGES, lambda _: idx(np.zeros((210, 8, 8), "u1")), "of images of 28 x 28, got shape"),
        (LABELS, lambda _: b"not compressed", "a complete gzip file, got Not a gzipped file"),
        (LABELS, lambda data: data[:-9], "a complete gzip file, got Compressed file ended before"),
        (LABELS, lambda data: data[:20] + b"xxxx" + data[24:], "a complete gzip file, got "),
        (LABELS, lambda _: gzip.compress(idx(np.zeros(9, "u1"))), "of a label for each of the 210"),
        (
            LABELS,
            lambda _: gzip.compress(idx(np.arange(210, dtype="u1") % 11)),
            "of classes 0 to 9, 21 images of each or more, got counts [20, 19, 19,",
        ),
    ],
)
def test_damaged_fashion_files_are_named(name, change, said, fashion):
    file = fashion / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"; fetch it once more$") as caught:
        load_fashion(str(fashion))
    message = str(caught.value).replace(".gz'", "'")
    assert message.startswith(f"demo: file {str(file).removesuffix('.gz')!r} must be {said}")
