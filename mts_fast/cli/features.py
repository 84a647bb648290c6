"""`mts-fast features`: embeddings, labels and sources in files -> a FeatureTable, resumably."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import locked, regular_target, save_tensors
from mts_fast._outputs import try_folder
from mts_fast._process import INTERRUPTED, postponed
from mts_fast.cli.pool import FLAGS, OP, PoolFile, by_flags, of_file, open_flags, open_labels
from mts_fast.distributed.group import Group
from mts_fast.distributed.sweep import SharedSweep
from mts_fast.features import Approximate, Columns, DistributionSweep, FeatureTable
from mts_fast.features.sweep import CHUNK
from mts_fast.pipeline.team import Team, team_of

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
    """Compute the table, or go on with it; returns the exit status. Several processes share the
    comparisons, and the first one writes."""
    team = team_of(OP)
    out = Path(arguments.out)
    target = team.led(lambda: _checked_target(arguments.out))
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
        search = team.together(lambda: _approximate(chosen))
    chunk = arguments.chunk or CHUNK
    with team.together(lambda: PoolFile(arguments.embeddings, chunk)) as pool:
        team.alone(lambda: _load_table(out, pool.shape[0]))
        sweep = team.together(lambda: _sweep_of(pool, arguments, search, team))
        unfinished = out.with_name(out.name + ".partial")
        progress = team.together(lambda: _Progress(unfinished, sweep, pool, options, team))
        if arguments.resume:
            progress.load()
        if not _sweep(sweep, progress, team):
            return progress.interrupted()
        progress.check_same_pool()
    if not team.leads:
        return 0
    try:
        columns = sweep.columns()
        with locked(target.parent):
            return _add_columns(out, columns, progress)
    except KeyboardInterrupt:
        return progress.interrupted()


def _checked_target(out: str) -> Path:
    """Where the table is to be written, links followed; its folder takes files."""
    with by_flags():
        target = regular_target(OP, out)
    for folder in {Path(out).absolute().parent, target.parent}:
        if not folder.is_dir():
            hint = "make the folder first"
            fail(ValueError, OP, "--out", "in an existing folder", repr(out), hint)
        try_folder(OP, "--out", folder)
    return target


def _approximate(options: Mapping[str, Any]) -> Approximate:
    with by_flags():
        return Approximate(**options)


def _sweep_of(
    pool: PoolFile, arguments: FeaturesOptions, search: str | Approximate, team: Team
) -> DistributionSweep:
    """The sweep at its start."""
    labels = open_labels(arguments.labels, pool.shape[0])
    flags = open_flags(arguments.is_synthetic, pool.shape[0])
    make: Callable[..., DistributionSweep] = DistributionSweep
    if isinstance(team.ranks, Group):
        make = partial(SharedSweep, team.ranks)
    with by_flags():
        return make(
            *(pool, labels, flags),
            k=arguments.k,
            neighbors=arguments.neighbors,
            small_class=arguments.small_class,
            chunk=pool.chunk,
            search=search,
        )


def _sweep(sweep: DistributionSweep, progress: _Progress, team: Team) -> bool:
    """Do the remaining work and save it; False where a signal asked to stop."""
    stopped = False
    with postponed() as stop, _bar(sweep.total, team) as show:
        show(sweep.done)
        # a unit of work is never interrupted, so that the saved state is whole
        with by_flags():
            for done in sweep.run():
                show(done)
                stopped, due = team.ranks.union([bool(stop), progress.is_due()])
                if stopped:
                    break
                if due:
                    progress.save_if_possible()
        progress.save_if_possible()
        return not stopped


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
        team: Team,
    ) -> None:
        self.path, self.sweep, self.pool, self.options = path, sweep, pool, options
        self.team = team
        self.fingerprint = _fingerprint(sweep)
        self.saved_at = time.monotonic()
        self.saved = False  # whether the file holds the current state

    def load(self) -> None:
        """Go on with the file, where there is one."""
        state = self.team.led(self._checked_state)
        if state is not None:
            self.team.together(lambda: self._go_on_with(state))

    def _go_on_with(self, state: dict[str, Tensor]) -> None:
        self.pool.go_on_with(state.pop(DIGESTS))
        self.sweep.load_state_dict(state)

    def _checked_state(self) -> dict[str, Tensor] | None:
        """What the file holds, of this pool; None without a file."""
        if not self.path.exists():
            return None
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
        return state

    def check_same_pool(self) -> None:
        """Refuse files that differ from one rank to another."""
        first = self.team.led(lambda: (self.fingerprint, self.pool.digests))

        def check() -> None:
            if first[0] != self.fingerprint or not torch.equal(first[1], self.pool.digests):
                hint = "name files that all ranks see"
                got = "another content than that of rank 0"
                fail(ValueError, OP, "FILE, --labels and --is-synthetic", "the same", got, hint)

        self.team.together(check)

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

    def is_due(self) -> bool:
        """Whether this process wants the progress to be saved."""
        self.saved = False
        return self.team.leads and time.monotonic() - self.saved_at >= SAVE_SECONDS

    def save_if_possible(self) -> None:
        """A full disk, which may have room again later, does not end the sweep."""
        state = self.sweep.state_dict()
        self.team.alone(lambda: self._try_to_save(state))
        self.saved_at = time.monotonic()

    def _try_to_save(self, state: dict[str, Tensor]) -> None:
        try:
            self.save({**state, DIGESTS: self.pool.digests})
        except OSError as error:
            message = str(error).removeprefix(f"{OP}: ")
            print(f"mts-fast features: the progress is not saved: {message}", file=sys.stderr)

    def save(self, state: dict[str, Tensor]) -> None:
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
        if not self.team.leads:
            return INTERRUPTED
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
def _bar(total: int, team: Team):  # type: ignore[no-untyped-def]
    """A function that shows how many units are done: a bar on a terminal, else lines."""
    if not team.leads:
        yield lambda done: None
        return
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
