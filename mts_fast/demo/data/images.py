"""The real images of the demo: scikit-learn's digits and Fashion-MNIST's IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._check import fail

# where Fashion-MNIST's files usually are: Debian's package dataset-fashion-mnist, and folders that
# torchvision's users name
FASHION_ROOTS = (
    "/usr/share/datasets/fashion-mnist",
    "data/FashionMNIST/raw",
    "~/data/FashionMNIST/raw",
    "~/.cache/FashionMNIST/raw",
)
FASHION_FIRST = "train-images-idx3-ubyte"
FASHION_SIDE, FASHION_CLASSES = 28, 10
# ten real and ten validation images of each class; the rest are base images and tests
LEAST_PER_CLASS = 21
# an IDX file: 4 bytes, of which the third says unsigned bytes and the fourth counts axes, then 4
# bytes for the length of each axis
IDX_MAGIC, IDX_UNSIGNED_BYTE, IDX_AXIS = 4, 8, 4
DIGITS_MAXIMUM = 16.0


@dataclass(frozen=True)
class LabelledImages:
    """images [N, channels, H, W] in [0, 1], labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> LabelledImages:
        return LabelledImages(self.images[index], self.labels[index])

    def __add__(self, other: LabelledImages) -> LabelledImages:
        both = zip((self.images, self.labels), (other.images, other.labels), strict=True)
        return LabelledImages(*(torch.cat(pair) for pair in both))


def load_digits() -> LabelledImages:
    """1797 handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).float()[:, None] / DIGITS_MAXIMUM
    return LabelledImages(images, torch.from_numpy(digits.target).long())


def load_fashion(root: str | None = None) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) of Fashion-MNIST, averaged down to 14 x 14.

    Args:
        root: folder of the IDX files; default: the usual folders, then the cache of Hugging Face's
            `datasets` where that is installed, which also downloads where there is a network.

    Raises:
        FileNotFoundError: no IDX files; says where they were looked for, and how to get them.
        ValueError: a damaged or foreign file.
    """
    folder = _fashion_folder(root)
    if folder is None:
        return _fashion_of_hugging_face()
    sets = []
    for part, least in (("train", LEAST_PER_CLASS), ("t10k", 1)):
        name = f"{part}-images-idx3-ubyte"
        pixels = _read_idx(folder, name)
        if pixels.shape[1:] != (FASHION_SIDE, FASHION_SIDE):
            expected = f"of images of {FASHION_SIDE} x {FASHION_SIDE}"
            _refuse(folder / name, expected, f"shape {pixels.shape}")
        images = F.avg_pool2d(torch.from_numpy(pixels).float()[:, None] / 255, 2)
        name = f"{part}-labels-idx1-ubyte"
        labels = _read_idx(folder, name)
        if labels.shape != pixels.shape[:1]:
            expected = f"of a label for each of the {len(pixels)} images"
            _refuse(folder / name, expected, f"shape {labels.shape}")
        counts = np.bincount(labels, minlength=FASHION_CLASSES)
        if len(counts) > FASHION_CLASSES or counts.min() < least:
            expected = f"of classes 0 to 9, {least} images of each or more"
            _refuse(folder / name, expected, f"counts {counts[: FASHION_CLASSES + 1].tolist()}")
        sets.append(LabelledImages(images, torch.from_numpy(labels).long()))
    return sets[0], sets[1]


def _fashion_folder(root: str | None) -> Path | None:
    """Where the IDX files are; None where `datasets` may have the images."""
    if root is not None:
        folder = Path(root).expanduser()
        # torchvision's `root` holds FashionMNIST/raw
        below = folder / "FashionMNIST" / "raw"
        return below if below.is_dir() else folder
    for name in FASHION_ROOTS:
        folder = Path(name).expanduser()
        if any((folder / f"{FASHION_FIRST}{end}").exists() for end in (".gz", "")):
            return folder
    if importlib.util.find_spec("datasets"):
        return None
    got = f"none in {', '.join(FASHION_ROOTS)}, and no Hugging Face `datasets`"
    _missing("there, or its folder given", got)


def _fashion_of_hugging_face() -> tuple[LabelledImages, LabelledImages]:
    """The same images by `datasets`, from its cache or a download."""
    from datasets import load_dataset

    sets = []
    for split in ("train", "test"):
        try:
            rows = load_dataset("zalando-datasets/fashion_mnist", split=split)
        except Exception as error:  # whatever its many readers and the network raise
            got = f"none in {', '.join(FASHION_ROOTS)}, and {type(error).__name__} by `datasets`"
            _missing("there, or its folder given", got)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]]))
        images = F.avg_pool2d(pixels.float()[:, None] / 255, 2)
        sets.append(LabelledImages(images, torch.tensor(rows["label"])))
    return sets[0], sets[1]


def _missing(expected: str, got: str) -> NoReturn:
    hint = (
        "on Debian `apt-get install dataset-fashion-mnist`; anywhere `pip install torchvision` and"
        " `torchvision.datasets.FashionMNIST('data', download=True)`, or take --data"
        " coloured-digits, which needs no files"
    )
    fail(FileNotFoundError, "demo", "Fashion-MNIST", expected, got, hint)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file, plain or gzipped."""
    paths = [path for path in (folder / f"{name}.gz", folder / name) if path.exists()]
    if not paths:
        expected = "a folder with Fashion-MNIST's IDX files"
        got = f"{str(folder)!r} without {name}[.gz]"
        hint = "on Debian `apt-get install dataset-fashion-mnist`"
        fail(FileNotFoundError, "demo", "--root", expected, got, hint)
    path = paths[0]
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        _refuse(path, "a complete gzip file", error)
    if len(data) < IDX_MAGIC or data[:2] != b"\0\0" or data[2] != IDX_UNSIGNED_BYTE:
        _refuse(path, "an IDX file of unsigned bytes", "other content")
    start = IDX_MAGIC + IDX_AXIS * data[3]
    if len(data) < start:
        _refuse(path, "a complete IDX file", f"{len(data)} bytes")
    shape = np.frombuffer(data, ">u4", data[3], IDX_MAGIC).tolist()
    if len(data) != start + math.prod(shape):
        expected = f"of {start + math.prod(shape)} bytes, for shape {shape}"
        _refuse(path, expected, f"{len(data)} bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _refuse(path: Path, expected: str, got: object) -> NoReturn:
    fail(ValueError, "demo", f"file {str(path)!r}", expected, got, "fetch it once more")
