"""Files of verdicts, one for each environment, and the table of them that this process uses.

A table is read at its first use and does not change afterwards: a run never changes its mind.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import locked, replaced_file
from mts_fast.backends.verdicts.environment import Environment, digest, environment
from mts_fast.backends.verdicts.requests import Request

logger = logging.getLogger("mts_fast")

OP = "verdicts"
SCHEMA = 1
VARIABLE = "MTS_FAST_VERDICTS"
OFF, CACHED = "off", "cached"
CACHE_VARIABLE = "MTS_FAST_CACHE_DIR"

# what was measured: "wins", and how; of JSON's types
Verdict = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Verdicts by key and backend."""

    path: Path | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)

    @functools.cached_property
    def ops(self) -> frozenset[str]:
        """The ops that have verdicts."""
        return frozenset(name.partition(" | ")[0] for name in self.verdicts)

    @functools.cached_property
    def digest(self) -> str:
        """Equal for tables that choose alike."""
        return digest({name: verdict["wins"] for name, verdict in self.verdicts.items()})

    def wins(self, request: Request, backend: str) -> bool | None:
        """Whether the backend was measured to be faster; None where it was not measured."""
        verdict = self.verdicts.get(name_of(request, backend))
        return None if verdict is None else bool(verdict["wins"])


def name_of(request: Request, backend: str) -> str:
    """The name of a verdict in its file."""
    return f"{request.key} | {backend}"


def folder() -> Path:
    """Where the files of verdicts lie: in MTS_FAST_CACHE_DIR, else the user's folder of caches."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen) / "verdicts"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "mts_fast" / "verdicts"


def path_of(environment: Environment) -> Path | None:
    """The environment's file: the one that MTS_FAST_VERDICTS names, else one of `folder`; None
    where it is "off"."""
    choice = os.environ.get(VARIABLE, CACHED)
    if choice == OFF:
        return None
    return folder() / f"{digest(environment)}.json" if choice in (CACHED, "") else Path(choice)


class _Foreign(ValueError):
    """A sound file, of another environment."""


class _OtherDevice(_Foreign):
    """A sound file, for the other kind of device."""


def read(path: Path, environment: Environment) -> dict[str, Verdict]:
    """The verdicts of a file. One that is missing, damaged or of another environment has none, and
    says so in a line of the log."""
    try:
        return _parsed(path, environment)
    except _OtherDevice:
        pass  # MTS_FAST_VERDICTS names one file for a process that uses both
    except FileNotFoundError:
        if os.environ.get(VARIABLE, CACHED) not in (CACHED, "", OFF):
            logger.warning("%s=%s is ignored: there is no such file", VARIABLE, path)
    except (OSError, ValueError) as error:
        logger.warning("verdicts in %s are ignored: %s", path, error)
    return {}


def _parsed(path: Path, environment: Environment) -> dict[str, Verdict]:
    """The verdicts of a sound file; ValueError for another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, there, verdicts = (content[n] for n in ("schema", "environment", "verdicts"))
        if schema != SCHEMA:
            raise _Foreign(f"schema must be {SCHEMA}, got {schema!r}; tune again")
        if there["type"] != environment["type"]:
            raise _OtherDevice(f"for {environment['type']}, got one for {there['type']}")
        other = [name for name in environment if there.get(name) != environment[name]]
        if other:
            raise _Foreign(
                f"environment must be that of this process, got another {other[0]}; tune again"
            )
        for name, verdict in verdicts.items():
            if not isinstance(verdict["wins"], bool):
                raise ValueError(f"wins of {name!r} must be true or false, got neither; tune again")
    except _Foreign:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"the file must be one of mts-fast tune, got {got}; tune again") from None
    return verdicts


def add(
    path: Path, environment: Environment, verdicts: Mapping[str, Verdict], *, again: bool = False
) -> dict[str, Verdict]:
    """Add verdicts to a file, and return all that it has afterwards. Several processes may do so at
    once. Verdicts that are there stay, unless `again`; a file that is none is put aside.

    Raises:
        ValueError: the file is sound, but of another environment.
        OSError: it cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        present = to_extend(path, environment)
        if present is None:
            os.replace(path, path.with_suffix(".damaged"))
            present = {}
        merged = {**present, **verdicts} if again else {**verdicts, **present}
        with replaced_file(OP, path) as part:
            content = {"schema": SCHEMA, "environment": environment, "verdicts": merged}
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return merged


def to_extend(path: Path, environment: Environment) -> dict[str, Verdict] | None:
    """The verdicts of a file that is to get more: none where it is missing; None where it is
    damaged.

    Raises:
        ValueError: the file is sound, but of another environment: perhaps committed beside
            someone's code.
    """
    hint = f"name another file in {VARIABLE}, or move this one away"
    try:
        return _parsed(path, environment)
    except FileNotFoundError:
        return {}
    except _OtherDevice as error:
        expected, _, got = str(error).partition(", got ")
        fail(ValueError, OP, str(path), expected, got, hint)
    except _Foreign as error:
        fail(ValueError, OP, str(path), "of this environment", f"one where {error}", hint)
    except ValueError as error:
        logger.warning("verdicts in %s are ignored: %s", path, error)
        return None


_tables: dict[torch.device, Table] = {}
_ignored = False


def table_for(device: torch.device) -> Table:
    """The table of this process for a device; read at the first call."""
    if _ignored:
        return Table()
    table = _tables.get(device)
    if table is None:
        table = _tables[device] = _load(device)
    return table


def use(device: torch.device, table: Table) -> None:
    """Take this table for a device from now on."""
    _tables[device] = table


def _load(device: torch.device) -> Table:
    # fake tensors may be on a device that is not there
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_available()
    ):
        return Table()
    choice = os.environ.get(VARIABLE, CACHED)
    if choice == OFF or (choice in (CACHED, "") and not folder().is_dir()):
        return Table()
    here = environment(device)
    path = path_of(here)
    assert path is not None
    verdicts = read(path, here)
    return Table(path, verdicts) if verdicts else Table()


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Inside, `auto` chooses as if nothing was measured."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


def forget() -> None:
    """Read the files again at the next use."""
    _tables.clear()


def digests_for(tensors: Iterable[Tensor]) -> list[str]:
    """The tables that serve these tensors, by their digests; devices without verdicts are left
    out."""
    devices = {t.device for t in tensors}
    return sorted({table.digest for d in devices if (table := table_for(d)).verdicts})
