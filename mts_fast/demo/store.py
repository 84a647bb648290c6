"""Finished jobs in files, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import mts_fast
from mts_fast._files import replaced_file, writing
from mts_fast.demo.jobs import Job, JobResult
from mts_fast.demo.options import OPTIONS
from mts_fast.demo.training import SETTINGS

FOLDER = "jobs"


def load_result(out: Path, job: Job) -> JobResult | None:
    """The result of the same job in an earlier run; None where there is none, or of other code,
    settings or options, or damaged."""
    try:
        saved = json.loads(_path(out, job).read_text())
        if saved["fingerprint"] != fingerprint(job):
            return None
        return JobResult(**{f.name: saved["result"][f.name] for f in fields(JobResult)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_result(out: Path, job: Job, result: JobResult) -> None:
    """Write a result, whole or not at all."""
    save_json(_path(out, job), {"fingerprint": fingerprint(job), "result": asdict(result)})


def save_json(path: Path, record: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with replaced_file("demo", path) as part, writing("demo", path):
        part.write_text(json.dumps(record, indent=indent) + "\n")


def fingerprint(job: Job) -> str:
    """Of everything that a result depends on, this package's source included."""
    settings = asdict(replace(SETTINGS[job.data], **job.settings))
    parts = [asdict(job), settings, OPTIONS.get(job.data), _source()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _source() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(mts_fast.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _path(out: Path, job: Job) -> Path:
    return out / FOLDER / f"{job.name.replace(' ', '-').replace('=', '-')}.json"
