"""Files of `mts-fast features`: errors name the flags, changed embeddings are noticed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mts_fast._check import INTEGER_DTYPES, check_range, describe, fail
from mts_fast.features import open_embeddings, open_vector
from mts_fast.features.pool_rows import EmbeddingSource, rows_at

OP = "features"
EMBEDDINGS = "FILE"
# argument of the library -> its name on the command line
FLAGS = {
    "embeddings": EMBEDDINGS,
    "labels": "--labels",
    "is_synthetic": "--is-synthetic",
    "neighbors": "--neighbors",
    "k": "-k",
    "chunk": "--chunk",
    "path": "--out",
    "search": "--search",
    "recall": "--recall",
    "seed": "--seed",
    "exact_below": "--exact-below",
}
DIGEST = hashlib.sha256
DIGEST_BYTES = 32


@contextmanager
def by_flags() -> Iterator[None]:
    """Errors of the library inside name what was given on the command line."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        name = re.match(r"\w+: (\w+) must be ", str(error))
        if name is None or name[1] not in FLAGS:
            raise
        message = f"{OP}: {FLAGS[name[1]]}" + str(error)[name.end(1) :]
        message = message.replace("small_class='pad'", "--small-class pad")
        raise _same_kind(error, message) from error


@contextmanager
def of_file(flag: str, spec: str) -> Iterator[None]:
    """Errors of opening a file name the flag that it was given for."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        message = re.sub(r"^\w+: ", "", str(error))
        if message.startswith("path must be an existing file"):
            fail(FileNotFoundError, OP, flag, "an existing file", repr(spec), "check the name")
        key = re.sub(r"^key must be", "KEY must be", message)
        hint = f"; name one as {flag} FILE:KEY" if key != message else ""
        raise _same_kind(error, f"{OP}: {flag} {spec}: {key}{hint}") from error


def _same_kind(error: Exception, message: str) -> Exception:
    """An error of the same kind: some subclasses take other arguments than a message."""
    kind = next(kind for kind in (OSError, TypeError, ValueError) if isinstance(error, kind))
    return kind(message)


def split_key(spec: str) -> tuple[str, str | None]:
    """FILE or FILE:KEY; a file of that whole name comes first."""
    path, colon, key = spec.rpartition(":")
    return (path, key) if colon and not os.path.exists(spec) else (spec, None)


def open_labels(spec: str, length: int) -> Tensor:
    """Classes [length], int64 >= 0."""
    flag = "--labels"
    labels = _open_numbers(flag, spec, length)
    hint = "number the classes from 0"
    check_range(OP, f"{flag} {spec}", labels, 0, torch.iinfo(torch.int64).max, hint)
    return labels


def open_flags(spec: str, length: int) -> Tensor:
    """Flags [length], bool."""
    flag = "--is-synthetic"
    flags = _open_numbers(flag, spec, length, torch.bool)
    check_range(OP, f"{flag} {spec}", flags, 0, 2, "0 is a real sample, 1 a synthetic one")
    return flags.bool()


def _open_numbers(flag: str, spec: str, length: int, *others: torch.dtype) -> Tensor:
    """Whole numbers [length] as int64, in memory of their own."""
    path, key = split_key(spec)
    with of_file(flag, spec):
        values = open_vector(path, key=key)
    name = f"{flag} {spec}"
    if values.dtype not in (*INTEGER_DTYPES, *others):
        hint = "save them as int64, in numpy by .astype('int64')"
        fail(TypeError, OP, name, "of whole numbers", describe(values), hint)
    if len(values) != length:
        expected = f"of length {length}, one number for each row of the embeddings"
        fail(ValueError, OP, name, expected, len(values), "name the file that belongs to them")
    return values.to(torch.int64, copy=True)


class PoolFile:
    """Embeddings [N, D] of a file, read in chunks, each of which has to be the same every time.

    The first reading of a chunk leaves a hash. Later ones are compared with it where the file's
    time has changed, and all of them when a sweep resumes with `digests` of an earlier process.
    Rows are copied: reading a mapped page of a file that was truncated kills the process.
    """

    def __init__(self, spec: str, chunk: int) -> None:
        path, key = split_key(spec)
        self.spec = spec
        with of_file(EMBEDDINGS, spec):
            self.source: EmbeddingSource = open_embeddings(path, key=key)
            # the file that was opened, also where another one takes its name later
            self._handle = os.open(path, os.O_RDONLY)
        self._opened = os.fstat(self._handle)
        self.shape = tuple(self.source.shape)
        self.chunk = chunk
        count = len(range(0, self.shape[0], chunk))
        self.digests = torch.zeros(count, DIGEST_BYTES, dtype=torch.uint8)  # 0 where not yet read

    def __enter__(self) -> PoolFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def __getitem__(self, rows: slice) -> Tensor:
        self._check_size()
        part = self.source[rows].clone()
        known = self.digests[rows.start // self.chunk]
        if self._changed() or not known.any():
            self._compare(rows, part, known)
        return part

    def rows(self, numbers: Tensor) -> Tensor:
        """Rows `numbers` [n], in any order; refused once the file's time has changed."""
        self._check_size()
        if self._changed():
            got, hint = "a later time of its last change", "run the same command again"
            name = f"{EMBEDDINGS} {self.spec}"
            fail(ValueError, OP, name, "unchanged while it is searched", got, hint)
        return rows_at(self.source, numbers)

    def _changed(self) -> bool:
        return os.fstat(self._handle).st_mtime_ns != self._opened.st_mtime_ns

    def _check_size(self) -> None:
        size = os.fstat(self._handle).st_size
        if size < self._opened.st_size:
            got = f"{size} of {self._opened.st_size} bytes"
            hint = "restore it, and run the same command again"
            fail(OSError, OP, f"{EMBEDDINGS} {self.spec}", "whole while it is read", got, hint)

    def go_on_with(self, digests: Tensor) -> None:
        """Take over the hashes of an earlier process, after comparing all rows that it has read.

        Raises:
            ValueError: some of these rows have changed.
        """
        for index in digests.any(1).nonzero().flatten().tolist():
            start = index * self.chunk
            rows = slice(start, min(start + self.chunk, self.shape[0]))
            self._compare(rows, self[rows], digests[index])
        self.digests.copy_(digests)

    def _compare(self, rows: slice, part: Tensor, known: Tensor) -> None:
        """Compare the hash of `part` with `known` [32]; where that is all 0, store it there."""
        data = part.contiguous().view(torch.uint8).numpy().data
        digest = torch.frombuffer(bytearray(DIGEST(data).digest()), dtype=torch.uint8)
        if not known.any():
            known.copy_(digest)
        elif not torch.equal(known, digest):
            got = f"other values in rows {rows.start} to {rows.stop - 1}"
            hint = "restore it, or start afresh with --no-resume"
            fail(ValueError, OP, f"{EMBEDDINGS} {self.spec}", "as the sweep began it", got, hint)
