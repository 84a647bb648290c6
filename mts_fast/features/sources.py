"""Embeddings, labels and flags in files; embeddings are read a slice of rows at a time."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mts_fast._check import FLOATING_DTYPES, check_path, describe, fail
from mts_fast._files import kind_of
from mts_fast.features.pool_rows import EmbeddingSource

logger = logging.getLogger("mts_fast")
OP = "open_embeddings"
SUFFIXES = (".npy", ".npz", ".safetensors")
# dtypes that torch and this library compute with, by their names in numpy and safetensors; unsigned
# integers of 16 to 64 bits are for labels, which become int64
NUMPY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
SAFETENSORS_DTYPES = (
    *("F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL"),
)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
# bytes of a member's own header in a zip file; its name and extra field follow
ZIP_HEADER = 30
ZIP_ENCRYPTED = 0x1  # a bit of a member's flags
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArraySource:
    """Rows of a numpy array, memory-mapped or not."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape

    @classmethod
    def of(cls, op: str, arg: str, array: np.ndarray) -> ArraySource:
        """Rows of an argument."""
        if array.dtype.str[1:] not in NUMPY_DTYPES:
            hint = "convert it to float32"
            fail(TypeError, op, arg, "an array of numbers", f"dtype {array.dtype}", hint)
        return cls(array)

    def __getitem__(self, rows: slice) -> Tensor:
        # torch supports only this machine's byte order, and a copy does not keep the file mapped
        return self._tensor(self.array[rows], copy=True)

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows `numbers` [n], in any order."""
        return self._tensor(self.array[numbers.numpy()], copy=None)

    @staticmethod
    def _tensor(part: np.ndarray, copy: bool | None) -> Tensor:
        native = np.array(part, dtype=part.dtype.newbyteorder("="), order="C", copy=copy)
        return torch.from_numpy(native)


class SafetensorsSource:
    """Rows of one tensor of a safetensors file."""

    def __init__(self, handle: Any, name: str) -> None:
        self.slice = handle.get_slice(name)
        self.shape = tuple(self.slice.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        return self.slice[rows]


def open_embeddings(path: str | os.PathLike[str], *, key: str | None = None) -> EmbeddingSource:
    """Embeddings [N, D] of a .npy, .npz or .safetensors file, without reading them.

    .npy files and uncompressed .npz members are memory-mapped (their checksum is not verified),
    safetensors read by slices; a compressed .npz member is read whole, which is said at INFO. `key`
    names the array in a file with several.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: a truncated, damaged, encrypted or foreign file, pickled objects
            (never loaded), another shape, no floating-point numbers of 16 to 64 bits, or no such
            key (with those that are there).

    Example:
        >>> import numpy, tempfile, pathlib, mts_fast
        >>> path = pathlib.Path(tempfile.mkdtemp(), "x.npy")
        >>> numpy.save(path, numpy.ones((5, 2), "f4"))
        >>> mts_fast.features.open_embeddings(path)[3:].shape
        torch.Size([2, 2])
    """
    source = _open(path, key)
    if len(source.shape) != 2 or not all(source.shape):
        hint = "save one row a sample; a file's arrays are named by key"
        _refuse(path, "a non-empty [N, D] array", f"shape {tuple(source.shape)}", hint)
    dtype = source[0:1].dtype
    if dtype not in FLOATING_DTYPES:
        hint = "convert it to float32"
        fail(TypeError, OP, f"file {str(path)!r}", "floating point", dtype, hint)
    return source


def open_vector(path: str | os.PathLike[str], *, key: str | None = None) -> Tensor:
    """Labels or flags [N] of a file, read whole; files and errors as for `open_embeddings`.

    Unsigned integers of 16 bits and more are refused: torch stores them, but does not compute with
    them.
    """
    source = _open(path, key)
    if len(source.shape) != 1:
        _refuse(path, "an [N] array", f"shape {tuple(source.shape)}", "name another with FILE:KEY")
    vector = source[0 : source.shape[0]]
    if vector.dtype in UNSIGNED:
        got = f"dtype {str(vector.dtype).removeprefix('torch.')}"
        hint = "save it as int64, in numpy by .astype('int64')"
        _refuse(path, "an array of signed or 8-bit whole numbers, or flags", got, hint)
    return vector


def _open(path: str | os.PathLike[str], key: str | None) -> EmbeddingSource:
    file = check_path(OP, "path", path)
    if key is not None and not isinstance(key, str):
        fail(TypeError, OP, "key", "a name or None", describe(key), "name an array of the file")
    if file.suffix not in SUFFIXES:
        _refuse(path, "one of " + ", ".join(SUFFIXES), repr(file.suffix), "convert it")
    if not file.is_file():
        got = kind_of(file) if file.exists() else repr(str(path))
        fail(FileNotFoundError, OP, "path", "an existing file", got, "look at its name")
    if file.suffix == ".npy" and key is not None:
        hint = "a .npy file holds one array"
        fail(ValueError, OP, "key", f"None for {str(path)!r}", repr(key), hint)
    try:
        if file.suffix == ".safetensors":
            return _open_safetensors(file, key)
        array = _map_member(file, key) if file.suffix == ".npz" else _map(file)
    except PermissionError as error:
        hint = "change its permissions"
        fail(PermissionError, OP, f"file {str(path)!r}", "readable", error, hint)
    except Exception as error:  # a damaged file may raise anything, from numpy, zlib, ast or struct
        if str(error).startswith(OP):
            raise
        got = f"{type(error).__name__}: {error}"
        _refuse(path, f"a complete {file.suffix} file of numbers", got, "write it anew")
    if array.dtype.str[1:] not in NUMPY_DTYPES:
        _refuse(path, "an array of numbers", f"dtype {array.dtype}", "convert it to float32")
    return ArraySource(array)


def _map(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _map_member(file: Path, key: str | None) -> np.ndarray:
    """An array of a .npz, memory-mapped where it is stored uncompressed."""
    with zipfile.ZipFile(file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        info = archive.getinfo(members[_pick(file, key, list(members))])
        if info.flag_bits & ZIP_ENCRYPTED:
            _refuse(file, "readable without a password", "an encrypted array", "decrypt it")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in READ_HEADER:
                _refuse(
                    file, "of .npy format 1.0 or 2.0", f"{version[0]}.{version[1]}", "save anew"
                )
            shape, fortran, dtype = READ_HEADER[version](stream)
            begin = stream.tell()
        _check_member(file, info, shape, dtype, begin)
        if info.compress_type != zipfile.ZIP_STORED:
            logger.info("%s: %s is not stored plainly and read whole", file, info.filename)
            with archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(ZIP_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = info.header_offset + ZIP_HEADER + lengths + begin
        return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


def _check_member(
    file: Path, info: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype, begin: int
) -> None:
    """Refuse a member whose size is not the one in its header: reading it would run into the next
    member, or ask for unbounded memory. `begin` is the length of the header."""
    if dtype.hasobject:
        _refuse(file, "an array of numbers", "pickled objects", "save it as numbers")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size - begin:
        got = f"{info.file_size - begin} bytes for shape {shape} of {dtype}"
        _refuse(file, f"such that {info.filename} is complete", got, "write it anew")


def _open_safetensors(file: Path, key: str | None) -> SafetensorsSource:
    from safetensors import safe_open

    handle = safe_open(file, framework="pt")
    source = SafetensorsSource(handle, _pick(file, key, list(handle.keys())))
    dtype = source.slice.get_dtype()
    if dtype not in SAFETENSORS_DTYPES:
        _refuse(file, "of numbers of 16 to 64 bits", dtype, "convert it to float32")
    return source


def _pick(file: Path, key: str | None, names: list[str]) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is None or key not in names:
        got = "none" if key is None else repr(key)
        hint = "name one, on a command line with FILE:KEY"
        fail(ValueError, OP, "key", f"one of {sorted(names)} in {str(file)!r}", got, hint)
    return key


def _refuse(path: object, expected: str, got: object, hint: str) -> NoReturn:
    fail(ValueError, OP, f"file {str(path)!r}", expected, got, hint)
