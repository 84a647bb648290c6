"""`mts-fast features`: embeddings, labels and sources in files -> a FeatureTable, resumably."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mts_fast._check import fail
from mts_fast._files import save_tensors
from mts_fast.features import DistributionSweep, FeatureTable, open_embeddings, open_vector
from mts_fast.features.sweep import CHUNK

OP = "features"
FORMAT = "mts_fast.DistributionSweep/1"
# how much work an interruption may cost, and how often the log has a line
SAVE_SECONDS = 30.0
LOG_SHARE = 0.1
# rows of the embeddings that tell one file from another
FINGERPRINT_ROWS = 16
INTERRUPTED = 130


def run_features(arguments: argparse.Namespace) -> int:
    """Compute the table, or go on with it; returns the exit status."""
    path, key = _split(arguments.embeddings)
    source = open_embeddings(path, key=key)
    out = Path(arguments.out)
    if not out.absolute().parent.is_dir():
        fail(ValueError, OP, "--out", "in an existing folder", repr(str(out)))
    table = FeatureTable.load(out) if out.exists() else FeatureTable()
    sweep = DistributionSweep(
        source,
        *(_vector(spec) for spec in (arguments.labels, arguments.is_synthetic)),
        k=arguments.k,
        neighbors=arguments.neighbors,
        small_class=arguments.small_class,
        chunk=arguments.chunk or CHUNK,
    )
    if table.num_samples not in (0, source.shape[0]):
        expected = f"a table of {source.shape[0]} samples, or a new file"
        fail(ValueError, OP, "--out", expected, f"one of {table.num_samples}")
    progress = _Progress(out.with_name(out.name + ".partial"), sweep)
    if arguments.resume:
        progress.load()
    with _stop_requests() as stop, _bar(sweep.total) as show:
        show(sweep.done)
        # a unit is never cut short, so that what is saved is whole.
        for done in sweep.run():
            show(done)
            if stop:
                break
            progress.save_now_and_then()
    if sweep.done < sweep.total:
        progress.save()
        left = f"interrupted at {sweep.done} of {sweep.total}"
        print(f"mts-fast features: {left}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    columns = sweep.columns()
    table.update(columns)
    table.save(out)
    progress.remove()
    print(f"{out}: {len(columns)} columns of {table.num_samples} samples")
    return 0


def _vector(spec: str) -> torch.Tensor:
    path, key = _split(spec)
    return open_vector(path, key=key)


def _split(spec: str) -> tuple[str, str | None]:
    """FILE or FILE:KEY; a file of that whole name comes first."""
    path, colon, key = spec.rpartition(":")
    return (path, key) if colon and not Path(spec).exists() else (spec, None)


class _Progress:
    """The unfinished sweep on disk, with what tells whether it is of the same pool."""

    def __init__(self, path: Path, sweep: DistributionSweep) -> None:
        self.path, self.sweep = path, sweep
        self.metadata = {"format": FORMAT, "fingerprint": _fingerprint(sweep)}
        self.saved_at = time.monotonic()

    def load(self) -> None:
        """Go on with the file, where there is one."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return
        hint = "delete it, or pass --no-resume"
        name = f"file {str(self.path)!r}"
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            fail(ValueError, OP, name, "a complete safetensors file", error, hint)
        if metadata != self.metadata:
            expected = "left by a run on the same pool with the same options"
            fail(ValueError, OP, name, expected, "another's", hint)
        self.sweep.load_state_dict(state)

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        save_tensors(OP, self.path, self.sweep.state_dict(), self.metadata)
        self.saved_at = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _fingerprint(sweep: DistributionSweep) -> str:
    """Of the classes and sources, and of some rows of the embeddings; shapes and options are
    compared with the state."""
    digest = hashlib.sha256()
    size = sweep.source.shape[0]
    for row in torch.linspace(0, size - 1, min(FINGERPRINT_ROWS, size)).long().tolist():
        digest.update(sweep.source[row : row + 1].double().numpy().tobytes())
    for vector in (sweep.labels, sweep.is_synthetic):
        digest.update(vector.numpy().tobytes())
    return json.dumps([list(sweep.source.shape), digest.hexdigest()])


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Inside, Ctrl-C and a batch system's SIGTERM are added to the list instead of raised."""
    requests: list[int] = []
    names = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, lambda got, _: requests.append(got)) for name in names}
    try:
        yield requests
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


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
