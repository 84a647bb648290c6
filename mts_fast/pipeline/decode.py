"""The pictures of a run, decoded once into a file of one size that trainings read from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from mts_fast._files import replaced_file, writing
from mts_fast.pipeline.data.images import UnreadableImage, read_image, shorter_side
from mts_fast.pipeline.data.samples import Picture

# pictures that one task of a worker decodes
CHUNK = 64
# threads that read and hash files: both release Python's lock
READERS = 4
VERSION = 1
# reasons by hash, of files that are no whole pictures
UNREADABLE = "unreadable.json"

# called with the number of files that were looked at
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Scanned:
    """A file as it is on the disk: hash of its content, shorter side of its header."""

    sha256: str
    side: int | None
    error: str | None = None  # why there is no file


class UnreadableFiles(Exception):
    """Files that are no whole pictures: reasons by index."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(f"{len(reasons)} files")
        self.reasons = reasons


def scan(files: Sequence[Picture], progress: Progress) -> list[Scanned]:
    """Read every file once; nothing is decoded."""
    with ThreadPoolExecutor(READERS) as pool:
        scanned = []
        for one in pool.map(_scan, files):
            scanned.append(one)
            progress(1)
        return scanned


def _scan(file: Picture) -> Scanned:
    try:
        content = file.read_bytes()
    except OSError as error:
        return Scanned("", None, f"cannot be opened: {error.strerror or error}")
    except UnreadableImage as error:
        return Scanned("", None, str(error))
    return Scanned(hashlib.sha256(content).hexdigest(), shorter_side(content))


def known_unreadable(folder: Path) -> dict[str, str]:
    """Reasons by hash, of earlier runs in this folder."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / UNREADABLE).read_text(encoding="utf-8")))
    return {}


def remember_unreadable(folder: Path, reasons: Mapping[str, str]) -> None:
    """Add to what `known_unreadable` returns."""
    path = folder / UNREADABLE
    with replaced_file("train", path) as part, writing("train", path):
        part.write_text(json.dumps({**known_unreadable(folder), **reasons}), encoding="utf-8")


def pixels_key(hashes: Sequence[str], size: int) -> str:
    """Names the file of these pictures, by their content."""
    text = "\n".join([f"{VERSION} {size}", *hashes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_pixels(
    files: Sequence[Picture], size: int, out: Path, workers: int, progress: Progress
) -> None:
    """Decode pictures into a .npy file [N, size, size, 3] of bytes, in order.

    The shorter side becomes `size`, the middle of the longer one is kept.

    Raises:
        OSError: the file cannot be written.
        UnreadableFiles: what is no whole picture, all of it; nothing was written.
    """
    shape = (len(files), size, size, 3)
    parts = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    reasons: dict[int, str] = {}
    with ExitStack() as stack:
        part = stack.enter_context(replaced_file("train", out))
        stack.enter_context(writing("train", out))
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        work = partial(_decode, size=size)
        if workers:
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))
            decoded = pool.map(work, parts)
        else:
            decoded = map(work, parts)
        start = 0
        for images in decoded:
            for i, image in enumerate(images, start):
                if isinstance(image, str):
                    reasons[i] = image
                else:
                    pixels[i] = image
            start += len(images)
            progress(len(images))
        if reasons:
            raise UnreadableFiles(reasons)
        pixels.flush()
        del pixels


def open_pixels(path: Path) -> np.ndarray:
    """The file, mapped into memory: [N, size, size, 3] bytes."""
    return np.load(path, mmap_mode="r")


def _decode(files: Sequence[Picture], size: int) -> list[np.ndarray | str]:
    """A picture [size, size, 3] each, or why there is none."""
    decoded: list[np.ndarray | str] = []
    for file in files:
        try:
            decoded.append(_square(read_image(file.read_bytes()), size))
        except UnreadableImage as error:
            decoded.append(str(error))
        except OSError as error:
            decoded.append(f"cannot be opened: {error.strerror or error}")
    return decoded


def _square(image: Image.Image, size: int) -> np.ndarray:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
