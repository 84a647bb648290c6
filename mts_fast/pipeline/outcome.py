"""What a finished run leaves beside its stages: read by `select`, `score` and `report`."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import kind_of, replaced_file, save_tensors, writing
from mts_fast._outputs import output_folder
from mts_fast._version import __version__
from mts_fast.pipeline.checkpoints import load_state
from mts_fast.pipeline.data.findings import counted, listed
from mts_fast.pipeline.data.samples import Role, Samples
from mts_fast.pipeline.stages import DONE

WEIGHTS, OUTCOME, TENSORS = "weights.csv", "outcome.json", "outcome.safetensors"
# of a run; verbs that read it do not write over them
OF_RUN = {
    *(WEIGHTS, OUTCOME, TENSORS),
    *("config.json", "metrics.jsonl", "model.safetensors"),
}
COLUMNS = ("file", "class", "role", "source", "path", "weight")
VERSION = 1


class _Damaged(Exception):
    """A file of a run's folder is not as it was written; the message says how."""


@dataclass(frozen=True)
class Row:
    """A training sample in the table of weights, real ones first."""

    file: str
    label: str
    role: Role
    source: str
    path: str
    weight: float


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        arms: test accuracy and the like, by what was trained on.
        held_out: the role that they are of.
        stages: folders of the stages, below the run's, by name.
        store: the pixels (.npy) or texts (.json) of all samples, below the run's folder.
        tensors: members [M] and held_out [T], which index the store; labels [M]; classes predicted
            by the clean classifier (predicted [M], confidence [M]); the label's probability under
            it (clean [M]) and under the one trained on everything (everything [M]); right/ARM [T].
    """

    folder: Path
    config: dict[str, Any]
    classes: tuple[str, ...]
    arms: dict[str, dict[str, float]]
    held_out: Role
    stages: dict[str, str]
    store: str
    remarks: tuple[str, ...]
    copies: tuple[tuple[str, str], ...]
    groups: tuple[str, ...] | None
    environment: dict[str, str]
    rows: tuple[Row, ...]
    tensors: dict[str, Tensor]

    def texts(self) -> list[str] | None:
        """The texts of the run's store; None where it holds pixels."""
        path = self.folder / self.store
        return json.loads(path.read_text()) if path.suffix == ".json" else None

    def stage(self, name: str) -> Any:
        """What a stage made.

        Raises:
            ValueError: it is gone or broken.
        """
        path = self.folder / self.stages[name] / DONE
        try:
            return load_state(path)
        except Exception as error:  # whatever a damaged file makes a reader raise
            got = f"{str(path)!r} ({str(error) or type(error).__name__})"
            hint = "run `mts-fast train` again: it makes what is missing"
            fail(ValueError, "run", "its stages", "as they were written", got, hint)


def rows_of(parts: Sequence[Samples], weights: Sequence[float]) -> tuple[Row, ...]:
    """The table of weights, of the samples of some roles one after the other."""
    places = [(part, i) for part in parts for i in range(len(part))]
    return tuple(
        Row(part.names[i], part.labels[i], part.role, part.origin(i), part.path(i), weight)
        for (part, i), weight in zip(places, weights, strict=True)
    )


def write_rows(op: str, path: Path, rows: Sequence[Row]) -> None:
    """The table of weights as CSV."""
    write_csv(op, path, COLUMNS, [tuple(asdict(row).values()) for row in rows])


def write_csv(op: str, path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file, whole or not at all; names that are no UTF-8 keep their bytes."""
    with (
        replaced_file(op, path) as part,
        writing(op, path),
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def save_outcome(outcome: Outcome) -> None:
    """Write the table, the tensors and, last, the record that makes the run a finished one."""
    write_rows("train", outcome.folder / WEIGHTS, outcome.rows)
    path = outcome.folder / TENSORS
    save_tensors("train", path, outcome.tensors, {"format": "mts_fast.outcome"})
    record = {
        name: getattr(outcome, name)
        for name in ("config", "classes", "arms", "held_out", "stages", "store", "remarks")
    }
    record |= {name: getattr(outcome, name) for name in ("copies", "groups", "environment")}
    record["weights_sha256"] = _sha256(outcome.folder / WEIGHTS)
    path = outcome.folder / OUTCOME
    with replaced_file("train", path) as part, writing("train", path):
        part.write_text(json.dumps({"version": VERSION, **record}, indent=1) + "\n")


@contextmanager
def output_file(op: str, outcome: Outcome, out: str | None, default: str) -> Iterator[Path]:
    """Where a verb writes: `out`, or a file of that name in the run's folder. Its folder is made
    and tried before the block, and removed again where the block fails.

    Raises:
        ValueError: no name, or a file of the run itself.
        OSError: a folder, or in one that cannot be written to.
    """
    path = outcome.folder / default if out is None else Path(out)
    if out == "":
        fail(ValueError, op, "--out", "a file", "''", "name one, or leave it out")
    if path.is_dir():
        fail(OSError, op, "--out", "a file, or new", kind_of(path), f"name {path / default}")
    if path.parent.resolve() == outcome.folder.resolve() and path.name in OF_RUN:
        fail(ValueError, op, "--out", "apart from the run's files", repr(out), "name another file")
    with output_folder(op, "--out", path.parent):
        yield path


def load_outcome(op: str, folder: Path) -> Outcome:
    """The outcome of a finished run.

    Raises:
        ValueError: no run's folder, or of one that has not finished, or damaged.
    """
    path = folder / OUTCOME
    expected = "the folder of a finished run of `mts-fast train`"
    if not path.exists():
        begun = (folder / "stages").is_dir()
        got = f"{str(folder)!r} " + ("of a run that has not finished" if begun else "without one")
        hint = "give the command of the run again: it goes on" if begun else _runs_near(folder)
        fail(ValueError, op, "RUN", expected, got, hint)
    try:
        record = json.loads(path.read_text())
        if record.pop("version") != VERSION:
            raise _Damaged("of another version of mts_fast")
        if record.pop("weights_sha256") != _sha256(folder / WEIGHTS):
            raise _Damaged(f"{WEIGHTS} is not as it was written")
        tensors = load_file(folder / TENSORS)
        rows = _read_rows(folder / WEIGHTS)
    except (_Damaged, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        hint = "give the command of the run again: stages that are there are not repeated"
        fail(ValueError, op, "RUN", expected, f"{str(folder)!r} ({error})", hint)
    for name in ("classes", "remarks"):
        record[name] = tuple(record[name])
    record["copies"] = tuple(map(tuple, record["copies"]))
    record["groups"] = None if record["groups"] is None else tuple(record["groups"])
    return Outcome(folder=folder, rows=rows, tensors=tensors, **record)


def _runs_near(path: Path) -> str:
    """Where a path is no run's folder: runs above, below or beside it."""
    if (path.parent / OUTCOME).exists():
        return f"pass {str(path.parent)!r}"
    below = [place.parent for place in path.glob(f"*/{OUTCOME}")]
    beside = {place.parent.name: place.parent for place in path.parent.glob(f"*/{OUTCOME}")}
    near = [beside[name] for name in difflib.get_close_matches(path.name, beside)]
    runs = listed(sorted(map(str, below or near)))
    return f"finished runs are {runs}" if runs else "check the path"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_rows(path: Path) -> tuple[Row, ...]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != COLUMNS:
            raise _Damaged(f"{path.name} without its columns {', '.join(COLUMNS)}")
        return tuple(
            Row(file, label, role, source, path, float(weight))  # type: ignore[arg-type]
            for file, label, role, source, path, weight in reader
        )


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "mts_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": gpu or f"{device.type}, {counted(torch.get_num_threads(), 'thread')}",
    }
