"""Where the samples of each role come from: folders of classes, lists, data sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data import Findings, Role, Samples
from mts_fast.pipeline.data.folders import read_folder
from mts_fast.pipeline.data.hub import is_dataset, read_dataset
from mts_fast.pipeline.data.lists import LIST_EXTENSIONS, read_list


def read_sources(config: Config, findings: Findings) -> dict[Role, Samples]:
    """The samples of every role that has any; what is wrong with them is told in `findings`."""
    paths: dict[Role, Sequence[str]] = {
        "real": (config.real,),
        "synthetic": config.synthetic,
        "val": () if config.val is None else (config.val,),
        "test": () if config.test is None else (config.test,),
    }
    samples: dict[Role, Samples] = {}
    for role, of_role in paths.items():
        joined = read_role(role, of_role, config, findings)
        if joined is not None:
            samples[role] = joined
    return samples


def read_role(
    role: Role, paths: Sequence[str], config: Config, findings: Findings
) -> Samples | None:
    """The samples of one role, of all its sources; None where there are none."""
    for path in {path for path in paths if paths.count(path) > 1}:
        findings.stop(f"--{role} {path!r} is named twice", "name it once")
    parts = [_read(role, path, config, findings) for path in paths]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    joined = known[0] if len(known) == 1 else _joined(role, known)
    if not joined:
        what = f"--{role} {', '.join(map(repr, paths))} has no samples"
        findings.stop(what, "check the path")
    return joined


def _read(role: Role, path: str, config: Config, findings: Findings) -> Samples | None:
    place = Path(path).expanduser()
    skip = config.on_corrupt == "skip"
    if is_dataset(path):
        return read_dataset(role, path, config.text_column, findings, skip_empty=skip)
    if place.suffix.lower() in LIST_EXTENSIONS:
        return read_list(role, place, config.text_column, findings, skip_empty=skip)
    if config.text_column is not None:
        findings.stop(
            f"--{role} {path!r} is no list, and texts stand in lists",
            "pass a CSV or Parquet file, or a data set",
        )
        return None
    return read_folder(role, place, findings)


def _joined(role: Role, parts: Sequence[Samples]) -> Samples:
    """Several sources as one; names begin with that of their source."""
    prefixes = _prefixes([part.source for part in parts])
    known = {*chain.from_iterable(part.labels for part in parts)}
    empty = {*chain.from_iterable(part.empty_classes for part in parts)} - known
    grouped = all(part.groups is not None for part in parts)
    return Samples(
        role,
        ", ".join(part.source for part in parts),
        names=tuple(
            f"{prefix}/{n}" for prefix, p in zip(prefixes, parts, strict=True) for n in p.names
        ),
        labels=tuple(chain.from_iterable(part.labels for part in parts)),
        contents=tuple(chain.from_iterable(part.contents for part in parts)),  # type: ignore[arg-type]
        origins=tuple(part.source for part in parts for _ in part.names),
        groups=tuple(chain.from_iterable(p.groups or () for p in parts)) if grouped else None,
        empty_classes=tuple(sorted(empty)),
    )


def _prefixes(sources: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(source).parts for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len({*ends}) == len(ends):
            return ends
    return list(sources)
