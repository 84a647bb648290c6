"""FeatureTable: named feature columns of a pool, standardised, on disk as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mts_fast._check import (
    check_device,
    check_finite,
    check_floating,
    check_length,
    check_mapping,
    check_path,
    describe,
    fail,
)
from mts_fast._files import kind_of, save_tensors
from mts_fast.features.columns import Columns, Note

OP = "FeatureTable"
# the paper's offline set of width 13, in the order of its selector's input.
PAPER_COLUMNS = (
    "real_centroid_cosine",
    "synthetic_centroid_cosine",
    "real_nearest3_cosine",
    "synthetic_nearest3_cosine",
    "knn5_weighted_label_agreement",
    "distance_to_median_percentile",
    "gradient_norm",
    "error_norm",
    "forgetting_counts",
)
# the one key of a file's metadata, so that equal tables give equal bytes
FORMAT = "mts_fast.FeatureTable/2"
# files without a checksum, whose order of columns stands under a key of its own
OLD_FORMAT = "mts_fast.FeatureTable/1"
# squares of float64 numbers between these neither overflow nor underflow
SQUARABLE = (1e-100, 1e100)


class FeatureTable(Mapping[str, Tensor]):
    """Columns [N, width] by name, over one pool of N samples.

    Each column is standardised per entry of its width, by its mean and population deviation over
    the pool. Constant entries become 0: those whose deviation is below the rounding of their mean.

    Example:
        >>> import torch, mts_fast
        >>> table = mts_fast.features.FeatureTable({"loss": torch.tensor([[1.0], [3.0]])})
        >>> table.standardized().flatten().tolist()
        [-1.0, 1.0]
        >>> table
        FeatureTable of 2 samples: loss [1]
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None) -> None:
        self._columns: dict[str, Tensor] = {}
        self._notes: dict[str, Note] = {}
        self.update({} if columns is None else columns)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._columns:
            hint = "compute it, and add it with update()"
            fail(KeyError, OP, "column", f"one of {list(self._columns)}", repr(name), hint)
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} [{value.shape[1]}]" for name, value in self._columns.items())
        return f"{OP} of {self.num_samples} samples: {columns or 'no columns'}"

    @property
    def num_samples(self) -> int:
        """N, or 0 for an empty table."""
        return len(next(iter(self._columns.values()))) if self._columns else 0

    @property
    def notes(self) -> dict[str, Note]:
        """By column, how it was computed, where that was noted: the recall of a search."""
        return {name: dict(note) for name, note in self._notes.items()}

    def update(self, columns: Mapping[str, Tensor]) -> None:
        """Add or replace columns, [N] or [N, width], all or none of them, with their notes.

        Raises:
            TypeError, ValueError: no mapping of names to floating-point tensors, another N or
                device than the table's, NaN or infinity (with the rows).
        """
        check_mapping(OP, "columns", columns, "pass a dict of names to tensors")
        checked: dict[str, Tensor] = {}
        for name, value in columns.items():
            _check_name(name)
            first = next(iter([*self._columns.values(), *checked.values()]), None)
            checked[name] = (
                _checked_column(name, value, first)
                .detach()
                .clone(
                    memory_format=torch.contiguous_format  # a view would keep its base in memory
                )
            )
        notes = columns.notes if isinstance(columns, Columns | FeatureTable) else {}
        self._columns.update(checked)
        for name in checked:
            self._notes.pop(name, None)
        self._notes.update({n: dict(note) for n, note in notes.items() if n in checked})

    def missing(self, names: Sequence[str] = PAPER_COLUMNS) -> list[str]:
        """Which of these columns are still to be computed: how a table is resumed."""
        return [name for name in _names(names) if name not in self._columns]

    def raw(self, names: Sequence[str] | None = None) -> Tensor:
        """Columns side by side [N, F], in the order of `names` (default: all, in order)."""
        return torch.cat([self[name] for name in self._order(names)], dim=1)

    def standardized(
        self, names: Sequence[str] | None = None, *, pool: FeatureTable | None = None
    ) -> Tensor:
        """Columns side by side [N, F], each entry with mean 0 and deviation 1 over the pool.

        Computed in float64, returned in the columns' dtype.

        Args:
            names: default: all, in order.
            pool: the table whose means and deviations are used, for samples that a selector was
                not trained on; default: this one.

        Raises:
            KeyError: a column that is not in the table, or not in the pool's.
            ValueError: a column of another width in the pool.
        """
        source = self if pool is None else pool
        columns = []
        for name in self._order(names):
            column, of_pool = self[name], source[name]
            if column.shape[1] != of_pool.shape[1]:
                expected = f"of width {column.shape[1]} in column {name!r}"
                hint = "compute both tables with the same options"
                fail(ValueError, OP, "pool", expected, of_pool.shape[1], hint)
            columns.append(_standardized(column, of_pool.to(column.device)))
        return torch.cat(columns, dim=1)

    def _order(self, names: Sequence[str] | None) -> list[str]:
        order = list(self._columns) if names is None else _names(names)
        if not order:
            hint = "add columns with update(), or name some"
            fail(ValueError, OP, "names", "at least one column", "none", hint)
        return order

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file with a checksum; it replaces an old one once it is complete.

        Equal tables give equal bytes. Of a symbolic link the file that it points to is replaced.

        Raises:
            OSError: it cannot be written (a full disk, no such folder, a device); an old one is
                unchanged.
        """
        checksum = _checksum(self._columns, self._notes)
        contents: dict[str, Any] = {"order": list(self._columns), "sha256": checksum}
        if self._notes:
            contents["notes"] = self._notes
        tensors = {f"column/{n}": v for n, v in self._columns.items()}
        save_tensors(OP, path, tensors, {FORMAT: json.dumps(contents)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureTable:
        """Read a table back, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a truncated or damaged file, one that is not a FeatureTable, or a folder.
        """
        file = check_path(OP, "path", path)
        if not file.exists():
            hint = "save() makes one"
            fail(FileNotFoundError, OP, "path", "an existing file", repr(str(path)), hint)
        if not file.is_file():
            _refuse(file, "a safetensors file", kind_of(file))
        columns, checksum = _read(file)
        try:
            table = cls(columns)
        except (TypeError, ValueError) as error:
            _refuse(file, "of columns that fit a table", error)
        if checksum is not None and checksum != _checksum(columns, columns.notes):
            _refuse(file, "as it was saved", "data of another checksum")
        return table


def _check_name(name: object) -> None:
    hint = "use words such as 'loss'"
    if not isinstance(name, str):
        fail(TypeError, OP, "columns' names", "strings", describe(name), hint)
    try:
        name.encode()
    except UnicodeEncodeError:
        fail(ValueError, OP, "columns' names", "text that can be saved", repr(name), hint)


def _checked_column(name: str, value: object, first: Tensor | None) -> Tensor:
    """A column [N, width] that fits beside the `first` of the table."""
    label = f"column {name!r}"
    column = check_floating(OP, label, value)
    column = column[:, None] if column.ndim == 1 else column
    if column.ndim != 2 or 0 in column.shape:
        hint = "flatten it, one row a sample"
        fail(ValueError, OP, label, "[N] or [N, width]", tuple(column.shape), hint)
    if first is not None:
        check_length(OP, label, column, len(first))
        check_device(OP, label, column, first.device, "the table's columns")
    check_finite(OP, label, column, "repair these rows first")
    return column


def _names(names: Iterable[str]) -> list[str]:
    """Several columns' names; a lone string would be read letter by letter."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        hint = "pass a list of names"
        fail(TypeError, OP, "names", "a sequence of names", describe(names), hint)
    return list(names)


def _standardized(column: Tensor, pool: Tensor) -> Tensor:
    """(column - mean) / deviation of the pool [P, width], 0 where an entry of that is constant."""
    values, reference = column.double(), pool.double()
    largest = reference.abs().amax(0)
    usual = (largest >= SQUARABLE[0]) & (largest <= SQUARABLE[1])
    scale = largest.where(~usual & (largest > 0), torch.ones_like(largest))
    values, reference = values / scale, reference / scale
    deviation, mean = torch.std_mean(reference, dim=0, correction=0)
    # a constant entry carries no information, and its rounding noise must not be blown up.
    constant = deviation <= torch.finfo(pool.dtype).eps * mean.abs()
    scaled = (values - mean) / deviation.masked_fill(constant, 1.0)
    return scaled.masked_fill(constant, 0.0).to(column.dtype)


def _checksum(columns: Mapping[str, Tensor], notes: Mapping[str, Note]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in order, and of the notes where there are."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode() if notes else b"")
    for name, value in columns.items():
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path) -> tuple[Columns, str | None]:
    """Columns and checksum of a file; old ones have no checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if FORMAT in metadata:
                contents = _parsed(file, metadata[FORMAT])
            elif metadata.get("format") == OLD_FORMAT:
                contents = {"order": _parsed(file, metadata.get("order", "")), "sha256": None}
            else:
                _refuse(file, f"of format {FORMAT}", f"metadata {metadata}"[:120])
            order, checksum, notes = _checked_contents(file, contents)
            columns = {name: handle.get_tensor(f"column/{name}") for name in order}
            return Columns(columns, notes), checksum
    except SafetensorError as error:
        _refuse(file, "a complete safetensors file", error)
    except OSError as error:
        fail(OSError, OP, f"file {str(file)!r}", "readable", error, "check its permissions")


def _parsed(file: Path, text: str) -> Any:
    """Parsed JSON; a damaged file may hold any text, even nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(file, "of readable metadata", error)


def _checked_contents(file: Path, contents: Any) -> tuple[list[str], str | None, dict[str, Note]]:
    """(names, checksum, notes) from a file's metadata."""
    order, checksum, notes = None, None, None
    if isinstance(contents, dict):
        order, checksum = contents.get("order"), contents.get("sha256")
        notes = contents.get("notes", {})
    if (
        isinstance(order, list)
        and all(isinstance(name, str) for name in order)
        and len({*order}) == len(order)
        and isinstance(checksum, str | None)
        and isinstance(notes, dict)
        and all(isinstance(note, dict) and name in order for name, note in notes.items())
    ):
        return order, checksum, notes
    _refuse(file, "of metadata that name its columns", f"{contents!r}"[:120])


def _refuse(file: Path, expected: str, got: object) -> NoReturn:
    hint = "restore it from a copy, or compute it anew"
    fail(ValueError, OP, f"file {str(file)!r}", expected, got, hint)
