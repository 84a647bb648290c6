"""The real images of the demo: scikit-learn's digits and Fashion-MNIST's IDX files."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# where Debian's package dataset-fashion-mnist puts the files
FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
# third byte of an IDX file: unsigned bytes
IDX_UNSIGNED_BYTE = 8
DIGITS_MAXIMUM = 16.0


@dataclass(frozen=True)
class LabelledImages:
    """images [N, 1, H, W] in [0, 1], labels [N]."""

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

    found = load()
    images = torch.from_numpy(found.images).float()[:, None] / DIGITS_MAXIMUM
    return LabelledImages(images, torch.from_numpy(found.target).long())


def load_fashion(root: str | None = None) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) of Fashion-MNIST, averaged down to 14 x 14.

    Raises:
        FileNotFoundError: no IDX files under `root`; says how to get them.
    """
    folder = Path(root or FASHION_ROOT)
    sets = []
    for part in ("train", "t10k"):
        pixels = _read_idx(folder, f"{part}-images-idx3-ubyte")
        images = F.avg_pool2d(torch.from_numpy(pixels).float()[:, None] / 255, 2)
        labels = torch.from_numpy(_read_idx(folder, f"{part}-labels-idx1-ubyte")).long()
        sets.append(LabelledImages(images, labels))
    return sets[0], sets[1]


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file, plain or gzipped."""
    for path, opener in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.exists():
            with opener(path, "rb") as file:
                data = file.read()
            break
    else:
        raise FileNotFoundError(
            f"demo: root must be a folder with Fashion-MNIST's IDX files, got {str(folder)!r} "
            f"without {name}[.gz]; on Debian `apt-get install dataset-fashion-mnist`"
        )
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_UNSIGNED_BYTE:
        raise ValueError(f"demo: {name} must be an IDX file of unsigned bytes, got other content")
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
