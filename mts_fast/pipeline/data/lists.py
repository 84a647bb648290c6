"""Samples of a list: a CSV or Parquet file with columns of files or texts, and of labels."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mts_fast.pipeline.data.findings import Findings, counted, listed, tell_empty
from mts_fast.pipeline.data.samples import TRAINING, Role, Samples, composed

FILE_COLUMNS = ("file", "path", "file_name", "filename", "image")
# cells that may name files in other bytes than UTF-8
PLACE_COLUMNS = (*FILE_COLUMNS, "source")
LABEL_COLUMNS = ("label", "class")
GROUP_COLUMN = "group"
ROLE_COLUMN = "role"
DELIMITERS = ",;\t|"
LIST_EXTENSIONS = (".csv", ".tsv", ".parquet")

# cells by column, and where the row stands
Row = tuple[dict[str, str | None], str]


def read_list(
    role: Role, path: Path, text_column: str | None, findings: Findings, *, skip_empty: bool = False
) -> Samples | None:
    """The samples of a list; None where it cannot be used, told in `findings`.

    A list is text: class names are strings, whatever they look like, and only an empty cell is
    missing. Files start at the list's folder. With `skip_empty`, rows without a text are left out.
    """
    option = f"--{role} {str(path)!r}"
    rows = _rows(option, path, text_column, findings)
    if rows is None:
        return None
    columns = list(rows[0][0]) if rows else []
    content = text_column or _first(FILE_COLUMNS, columns)
    label = _first(LABEL_COLUMNS, columns)
    for wanted, column in ((text_column or " or ".join(FILE_COLUMNS), content), ("label", label)):
        if column not in columns:
            do = f"name one of {listed(columns)} so" if columns else "write a first line of names"
            if columns and column == content and text_column is None:
                do += ", or pass --text-column where they are texts"
            findings.stop(f"{option} has no column {wanted}", do)
    if content not in columns or label not in columns:
        return None
    rows = _of_role(role, option, rows, findings)
    if text_column is None:
        return _of_files(role, path, rows, content, label, findings)
    return _of_texts(role, path, rows, content, label, findings, skip_empty=skip_empty)


def _of_role(role: Role, option: str, rows: list[Row], findings: Findings) -> list[Row]:
    """Rows of this role, where a column tells real ones from synthetic, as `select` writes it."""
    if role not in TRAINING:
        return rows
    (other,) = (r for r in TRAINING if r != role)
    of_role = [row for row in rows if (row[0].get(ROLE_COLUMN) or "").strip() != other]
    if len(of_role) < len(rows):
        findings.remark(f"{option}: {len(rows) - len(of_role)} rows of role {other} are left out")
    return of_role


def _of_files(
    role: Role, path: Path, rows: Sequence[Row], column: str, label: str, findings: Findings
) -> Samples:
    option = f"--{role} {str(path)!r}"
    chosen: dict[str, tuple[str, Path, str, str]] = {}
    missing: list[str] = []
    for cells, place in rows:
        name, cell = cells.get(column) or "", (cells.get(label) or "").strip()
        for value, called in ((name.strip(), column), (cell, label)):
            if not value:
                what = f"{option}: {place} has no {called} ({name.strip() or cell or 'empty'})"
                findings.stop(what, "fill the cell, or take the row out")
        if not name.strip() or not cell:
            continue
        file = _resolved(path.parent, name)
        if not file.is_file():
            # spaces around a name belong to it only where a file is called so
            name = name.strip()
            file = _resolved(path.parent, name)
        if not file.is_file():
            missing.append(f"{name} ({place})")
            continue
        key = str(file)
        if key not in chosen:
            chosen[key] = (name, file, composed(cell), (cells.get(GROUP_COLUMN) or "").strip())
        elif chosen[key][2] != composed(cell):
            what = f"{option}: {name!r} is of class {chosen[key][2]!r} and, in {place}, {cell!r}"
            findings.stop(what, "leave one of the rows")
        else:
            findings.remark(f"{option}: {name!r} stands there twice ({place}) and counts once")
    if missing:
        do = "does" if len(missing) == 1 else "do"
        missed = counted(len(missing), "file")
        what = f"{option} names {missed} that {do} not exist: {listed(missing)}"
        findings.stop(what, "paths start at the list's folder; put the files there, or drop them")
    names = [name for name, *_ in chosen.values()]
    groups = [group for *_, group in chosen.values()]
    return Samples(
        role,
        str(path),
        tuple(names),
        tuple(cell for _, _, cell, _ in chosen.values()),
        tuple(file for _, file, _, _ in chosen.values()),
        tuple(groups) if any(groups) else None,
    )


def _of_texts(
    role: Role,
    path: Path,
    rows: Sequence[Row],
    column: str,
    label: str,
    findings: Findings,
    *,
    skip_empty: bool,
) -> Samples:
    option = f"--{role} {str(path)!r}"
    chosen: list[tuple[str, str, str, str]] = []
    empty: list[str] = []
    for number, (cells, place) in enumerate(rows, start=1):
        text, cell = cells.get(column) or "", (cells.get(label) or "").strip()
        if not cell:
            what = f"{option}: {place} has no {label}"
            findings.stop(what, "fill the cell, or take the row out")
        if not text.strip():
            empty.append(place)
        if cell and text.strip():
            group = (cells.get(GROUP_COLUMN) or "").strip()
            chosen.append((f"{path.name}:{number}", text, composed(cell), group))
    tell_empty(option, column, empty, findings, skip=skip_empty)
    groups = [group for *_, group in chosen]
    return Samples(
        role,
        str(path),
        tuple(name for name, *_ in chosen),
        tuple(cell for _, _, cell, _ in chosen),
        tuple(text for _, text, _, _ in chosen),
        tuple(groups) if any(groups) else None,
    )


def _resolved(folder: Path, name: str) -> Path:
    """The file of a cell: from the list's folder on, with either separator."""
    file = folder / name
    if not file.exists() and "\\" in name:
        return folder / PurePosixPath(name.replace("\\", "/"))
    return file


def _rows(option: str, path: Path, text_column: str | None, findings: Findings) -> list[Row] | None:
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet_rows(path)
        return _csv_rows(path, text_column)
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        findings.stop(f"{option} is not UTF-8 in line {line}", "save it as UTF-8")
    except csv.Error as error:
        findings.stop(f"{option} is no CSV file ({error})", "write it anew, with quoted cells")
    except ImportError:
        findings.stop(f"{option} needs pyarrow", "pip install 'mts_fast[data]', or save it as CSV")
    except (OSError, ValueError) as error:
        findings.stop(f"{option} cannot be read ({error})", "check the file")
    return None


def _csv_rows(path: Path, text_column: str | None) -> list[Row]:
    """The rows of a file in UTF-8; names of files that are there may hold other bytes, as `select`
    writes them.

    Raises:
        UnicodeDecodeError: other bytes elsewhere.
    """
    content = path.read_bytes()
    try:
        return list(_parsed(content.decode("utf-8-sig"), text_column))
    except UnicodeDecodeError:
        rows = list(_parsed(content.decode("utf-8-sig", "surrogateescape"), text_column))
        for cells, _ in rows:
            for name, cell in cells.items():
                is_place = name in PLACE_COLUMNS and (path.parent / (cell or "")).exists()
                if not is_place and not _is_utf8(f"{name}{cell or ''}"):
                    raise
        return rows


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= character <= "\udcff" for character in text)


def _parsed(text: str, text_column: str | None) -> Iterator[Row]:
    """Rows with the number of the row and of its first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, text_column))
    names: list[str] | None = None
    line = number = 0
    for cells in reader:
        first, line = line + 1, reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            continue
        number += 1
        yield dict(zip(names, cells, strict=False)), f"row {number} (line {first})"


def _delimiter(text: str, text_column: str | None) -> str:
    """The separator by which the first line has most of the names that are looked for."""
    head = re.split(r"\r\n|\r|\n", text.lstrip("\r\n"), maxsplit=1)[0]
    wanted = {*FILE_COLUMNS, *LABEL_COLUMNS, text_column}

    def known(delimiter: str) -> int:
        cells = next(csv.reader([head], delimiter=delimiter), [])
        return sum(cell.strip() in wanted for cell in cells)

    return max(DELIMITERS, key=known)


def _parquet_rows(path: Path) -> list[Row]:
    from pyarrow import parquet

    table = parquet.read_table(path).to_pylist()
    return [
        ({name: _text(value) for name, value in row.items()}, f"row {number}")
        for number, row in enumerate(table, start=1)
    ]


def _text(value: Any) -> str | None:
    """A cell as text; None is missing, and NaN is where a table of floats lacks a value."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    return str(value)


def _first(names: Sequence[str], columns: Sequence[str]) -> str:
    return next((name for name in names if name in columns), names[0])
