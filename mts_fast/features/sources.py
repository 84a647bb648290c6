"""Embeddings, labels and flags in files; embeddings are read a slice of rows at a time."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.features.sweep import EmbeddingSource

logger = logging.getLogger("mts_fast")
OP = "open_embeddings"
SUFFIXES = (".npy", ".npz", ".safetensors")
# a member's own header in a zip file: 30 bytes, then its name and extra field.
ZIP_HEADER = 30
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArraySource:
    """Rows of a numpy array, memory-mapped or not."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape

    def __getitem__(self, rows: slice) -> Tensor:
        part = self.array[rows]
        # torch knows this machine's byte order alone, and a copy lets go of the file.
        return torch.from_numpy(np.array(part, dtype=part.dtype.newbyteorder("="), order="C"))


class SafetensorsSource:
    """Rows of one tensor of a safetensors file."""

    def __init__(self, handle: Any, name: str) -> None:
        self.slice = handle.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        return self.slice[rows]


def open_embeddings(path: str | os.PathLike[str], *, key: str | None = None) -> EmbeddingSource:
    """Embeddings [N, D] of a .npy, .npz or .safetensors file, without reading them.

    .npy files and uncompressed .npz members are memory-mapped, safetensors read by slices; a
    compressed .npz member is read whole, which is said at INFO. `key` names the array in a file
    with several.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: a truncated or foreign file, pickled objects (never loaded), another
            shape, no floating-point numbers, or no such key (with those that are there).

    Example:
        >>> import numpy, tempfile, pathlib, mts_fast
        >>> path = pathlib.Path(tempfile.mkdtemp(), "x.npy")
        >>> numpy.save(path, numpy.ones((5, 2), "f4"))
        >>> mts_fast.features.open_embeddings(path)[3:].shape
        torch.Size([2, 2])
    """
    source = _open(path, key)
    if len(source.shape) != 2 or not all(source.shape):
        _refuse(path, "a non-empty [N, D] array", f"shape {tuple(source.shape)}")
    if not source[0:1].is_floating_point():
        fail(TypeError, OP, f"file {str(path)!r}", "floating point", source[0:1].dtype)
    return source


def open_vector(path: str | os.PathLike[str], *, key: str | None = None) -> Tensor:
    """Labels or flags [N] of a file as above, read whole. The errors are the same."""
    source = _open(path, key)
    if len(source.shape) != 1:
        _refuse(path, "an [N] array", f"shape {tuple(source.shape)}", "name another with FILE:KEY")
    return source[0 : source.shape[0]]


def _open(path: str | os.PathLike[str], key: str | None) -> EmbeddingSource:
    file = Path(path)
    if file.suffix not in SUFFIXES:
        _refuse(path, "one of " + ", ".join(SUFFIXES), repr(file.suffix), "convert it")
    if not file.is_file():
        raise FileNotFoundError(f"{OP}: path must be an existing file, got {str(path)!r}")
    if file.suffix == ".safetensors":
        return _open_safetensors(file, key)
    try:
        array = _map_member(file, key) if file.suffix == ".npz" else _map(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if str(error).startswith(OP):
            raise
        _refuse(path, f"a complete {file.suffix} file of numbers", error)
    if array.dtype.kind not in "fiub":
        _refuse(path, "an array of numbers", f"dtype {array.dtype}")
    return ArraySource(array)


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _map_member(file: Path, key: str | None) -> np.ndarray:
    """An array of a .npz, mapped where it is stored as it is."""
    with zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        info = archive.getinfo(members[_pick(file, key, list(members))])
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
        if info.compress_type != zipfile.ZIP_STORED or version not in READ_HEADER:
            logger.info("%s: %s is not stored plainly and read whole", file, info.filename)
            with archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(ZIP_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        stream.seek(info.header_offset + ZIP_HEADER + lengths)
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = READ_HEADER[version](stream)
        if dtype.hasobject:
            _refuse(file, "an array of numbers", "pickled objects")
        return np.memmap(file, dtype, "r", stream.tell(), shape, "F" if fortran else "C")


def _open_safetensors(file: Path, key: str | None) -> SafetensorsSource:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt")
    except SafetensorError as error:
        _refuse(file, "a complete safetensors file", error)
    return SafetensorsSource(handle, _pick(file, key, list(handle.keys())))


def _pick(file: Path, key: str | None, names: list[str]) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        got = "none" if key is None else repr(key)
        fail(ValueError, OP, "key", f"one of {sorted(names)} in {str(file)!r}", got)
    return key


def _refuse(path: object, expected: str, got: object, hint: str = "") -> NoReturn:
    fail(ValueError, OP, f"file {str(path)!r}", expected, got, hint)
