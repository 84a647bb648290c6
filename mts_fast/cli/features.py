"""`mts-fast features`: embeddings, labels and sources in files -> a FeatureTable, resumably."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import locked, regular_target, save_tensors
from mts_fast._outputs import try_folder
from mts_fast._process import INTERRUPTED, postponed
from mts_fast.cli.pool import FLAGS, OP, PoolFile, by_flags, of_file, open_flags, open_labels
from mts_fast.features import Approximate, Columns, DistributionSweep, FeatureTable
from mts_fast.features.sweep import CHUNK

FORMAT = "mts_fast.DistributionSweep/2"
DIGESTS = "pool/digests"
AFRESH = "start afresh with --no-resume"
# time between saves of the progress, and share of the work between log lines
SAVE_SECONDS = 30.0
LOG_SHARE = 0.1


@dataclass(frozen=True)
class FeaturesOptions:
    """Options as the command line names them; files may name an array, FILE:KEY."""

    embeddings: str
    labels: str
    is_synthetic: str
    out: str
    k: int
    neighbors: int
    small_class: str
    chunk: int | None
    search: str
    recall: float
    seed: int
    exact_below: int
    resume: bool


def run_features(arguments: FeaturesOptions) -> int:
    """Compute the table, or go on with it; returns the exit status."""
    out = Path(arguments.out)
    with by_flags():
        target = regular_target(OP, arguments.out)
    for folder in {out.absolute().parent, target.parent}:
        if not folder.is_dir():
            hint = "make the folder first"
            fail(ValueError, OP, "--out", "in an existing folder", repr(str(out)), hint)
        try_folder(OP, "--out", folder)
    options: dict[str, int | float | str] = {
        "-k": arguments.k,
        "--neighbors": arguments.neighbors,
        "--chunk": arguments.chunk or CHUNK,
        "--search": arguments.search,
    }
    search: str | Approximate = "exact"
    if arguments.search == "approximate":
        chosen = {n: getattr(arguments, n) for n in ("recall", "seed", "exact_below")}
        options |= {FLAGS[name]: value for name, value in chosen.items()}
        with by_flags():
            search = Approximate(**chosen)
    with PoolFile(arguments.embeddings, arguments.chunk or CHUNK) as pool:
        size = pool.shape[0]
        _load_table(out, size)
        labels = open_labels(arguments.labels, size)
        flags = open_flags(arguments.is_synthetic, size)
        with by_flags():
            sweep = DistributionSweep(
                pool,
                labels,
                flags,
                k=arguments.k,
                neighbors=arguments.neighbors,
                small_class=arguments.small_class,
                chunk=pool.chunk,
                search=search,
            )
        progress = _Progress(out.with_name(out.name + ".partial"), sweep, pool, options)
        if arguments.resume:
            progress.load()
        if not _sweep(sweep, progress):
            return progress.interrupted()
    try:
        columns = sweep.columns()
        with locked(target.parent):
            return _add_columns(out, columns, progress)
    except KeyboardInterrupt:
        return progress.interrupted()


def _sweep(sweep: DistributionSweep, progress: _Progress) -> bool:
    """Do the remaining work and save it; False where a signal asked to stop."""
    with postponed() as stop, _bar(sweep.total) as show:
        show(sweep.done)
        # a unit of work is never interrupted, so that the saved state is whole
        with by_flags():
            for done in sweep.run():
                show(done)
                if stop:
                    break
                progress.save_now_and_then()
        progress.save_if_possible()
        return not stop


def _add_columns(out: Path, columns: Columns, progress: _Progress) -> int:
    """Add to the table as it is on disk: another process may have added columns meanwhile."""
    with postponed():
        table = _load_table(out, progress.pool.shape[0])
        table.update(columns)
        with by_flags():
            table.save(out)
        progress.remove()
    print(f"{out}: {len(columns)} columns of {table.num_samples} samples")
    for name, note in columns.notes.items():
        print(f"{name}: recall {note['recall']} ({note['search']})")
    return 0


def _load_table(out: Path, size: int) -> FeatureTable:
    """The table that is to get the columns, or a new one."""
    with of_file("--out", str(out)):
        table = FeatureTable.load(out) if out.exists() else FeatureTable()
    if table.num_samples not in (0, size):
        expected = f"a table of {size} samples, or a new file"
        got = f"one of {table.num_samples}"
        fail(ValueError, OP, "--out", expected, got, "name another file")
    return table


class _Progress:
    """The unfinished sweep on disk, with a fingerprint of its pool."""

    def __init__(
        self,
        path: Path,
        sweep: DistributionSweep,
        pool: PoolFile,
        options: Mapping[str, int | float | str],
    ) -> None:
        self.path, self.sweep, self.pool, self.options = path, sweep, pool, options
        self.fingerprint = _fingerprint(sweep)
        self.saved_at = time.monotonic()
        self.saved = False  # whether the file holds the current state

    def load(self) -> None:
        """Go on with the file, where there is one."""
        if not self.path.exists():
            return
        name = f"file {str(self.path)!r}"
        metadata, state = self._read(name)
        saved = json.loads(metadata["options"])
        # files of before there was a choice have no --search
        for flag, value in {"--search": "exact", **saved}.items():
            if value != self.options.get(flag):
                hint = f"pass {flag} {value}, or {AFRESH}"
                expected = f"{value}, as in {str(self.path)!r}"
                fail(ValueError, OP, flag, expected, self.options.get(flag), hint)
        if metadata["fingerprint"] != self.fingerprint:
            expected = "left by a run on the same pool"
            fail(ValueError, OP, name, expected, "one of other labels or sizes", AFRESH)
        self.pool.go_on_with(state.pop(DIGESTS))
        self.sweep.load_state_dict(state)

    def _read(self, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors of the file; refuses one that save() has not written."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            fail(ValueError, OP, name, "a file", "a folder or a device", "name another --out")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            fail(ValueError, OP, name, "a complete safetensors file", error, AFRESH)
        if metadata.get("format") != FORMAT:
            fail(ValueError, OP, name, f"of format {FORMAT}", metadata.get("format"), AFRESH)
        checksum = metadata.pop("sha256", None)
        if checksum != _checksum(metadata, state):
            fail(ValueError, OP, name, "as it was saved", "data of another checksum", AFRESH)
        return metadata, state

    def save_now_and_then(self) -> None:
        self.saved = False
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save_if_possible()

    def save_if_possible(self) -> None:
        """A full disk, which may have room again later, does not end the sweep."""
        try:
            self.save()
        except OSError as error:
            message = str(error).removeprefix(f"{OP}: ")
            print(f"mts-fast features: the progress is not saved: {message}", file=sys.stderr)
        self.saved_at = time.monotonic()

    def save(self) -> None:
        state = {**self.sweep.state_dict(), DIGESTS: self.pool.digests}
        metadata = {
            "format": FORMAT,
            "options": json.dumps(self.options),
            "fingerprint": self.fingerprint,
        }
        metadata["sha256"] = _checksum(metadata, state)
        save_tensors(OP, self.path, state, metadata)
        self.saved = True

    def interrupted(self) -> int:
        """Print how far the sweep came; returns the exit status."""
        what = "the same command goes on from there" if self.saved else "run it again"
        done = f"interrupted at {self.sweep.done} of {self.sweep.total}"
        print(f"mts-fast features: {done}; {what}", file=sys.stderr)
        return INTERRUPTED

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _fingerprint(sweep: DistributionSweep) -> str:
    """Hash of sizes, classes and sources; the embeddings are hashed as they are read."""
    digest = hashlib.sha256(json.dumps(list(sweep.source.shape)).encode())
    for vector in (sweep.labels, sweep.is_synthetic):
        digest.update(vector.numpy().tobytes())
    return digest.hexdigest()


def _checksum(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _bar(total: int):  # type: ignore[no-untyped-def]
    """A function that shows how many units are done: a bar on a terminal, else lines."""
    try:
        from rich.console import Console
        from rich.progress import Progress

        terminal = Console(stderr=True)
    except ModuleNotFoundError:
        terminal = None
    if terminal is not None and terminal.is_terminal:
        with Progress(console=terminal) as progress:
            task = progress.add_task("distribution features", total=total)
            yield lambda done: progress.update(task, completed=done)
        return
    next_line = 0.0

    def line(done: int) -> None:
        nonlocal next_line
        if done >= next_line * total:
            print(f"mts-fast features: {done} of {total}", file=sys.stderr)
            next_line = done / total + LOG_SHARE

    yield line
