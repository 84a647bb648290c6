"""Samples of a folder: its first level names the classes, files at any depth below are samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mts_fast.pipeline.data.findings import Findings, listed
from mts_fast.pipeline.data.images import EXTENSIONS
from mts_fast.pipeline.data.samples import Role, Samples, composed

# what systems put beside pictures; names that begin with a dot are hidden anyway
SYSTEM_NAMES = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin")
# a folder of splits has these, and class folders below each
SPLITS: dict[Role, tuple[str, ...]] = {
    "real": ("real", "train", "training"),
    "synthetic": ("synthetic", "generated", "train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def read_folder(role: Role, folder: Path, findings: Findings) -> Samples | None:
    """The samples of a folder of class folders; None where it is none, told in `findings`.

    Links count as what they point to; a link to a folder that it lies in ends there. Extensions, in
    any case, choose candidates; content is looked at later.
    """
    option = f"--{role} {str(folder)!r}"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        findings.stop(
            f"{option} {what}", "pass a folder of class folders, or a CSV or Parquet file"
        )
        return None
    classes = sorted((f for f in _visible(folder) if f.is_dir()), key=_order)
    loose = [f for f in _visible(folder) if not f.is_dir()]
    proposed = _splits_below(role, classes)
    if proposed is not None:
        names = listed([f.name for f in classes])
        findings.stop(f"{option} holds {names}, which are splits", f"pass {str(proposed)!r}")
        return None
    if not classes:
        what = f"{option} has no class folders"
        do = f"put its {len(loose)} files into one folder for each class" if loose else "fill it"
        findings.stop(what, do)
        return None
    samples: list[tuple[str, str, Path]] = []
    others: list[Path] = [f for f in loose if f.suffix]
    counts: Counter[str] = Counter()
    for folder_of_class in classes:
        label = composed(folder_of_class.name)
        counts[label] += 0
        for path in sorted(_files(folder_of_class, ()), key=_order):
            if path.suffix.lower() in EXTENSIONS:
                samples.append((path.relative_to(folder).as_posix(), label, path))
                counts[label] += 1
            else:
                others.append(path)
    if others:
        _tell_others(option, others, findings)
    return Samples(
        role,
        str(folder),
        names=tuple(name for name, _, _ in samples),
        labels=tuple(label for _, label, _ in samples),
        contents=tuple(path for _, _, path in samples),
        empty_classes=tuple(label for label, count in counts.items() if count == 0),
    )


def is_hidden(name: str) -> bool:
    """Whether a system hides files of this name, or makes them by itself."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _visible(folder: Path) -> list[Path]:
    return [folder / name for name in os.listdir(folder) if not is_hidden(name)]


def _order(path: Path) -> tuple[str, bytes]:
    """Of names, alike on every file system."""
    return composed(str(path)), os.fsencode(path)


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """All files below a folder; `above` are the folders that it lies in."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for path in _visible(folder):
        if path.is_dir():
            yield from _files(path, (*above, identity))
        elif path.is_file():
            yield path


def _splits_below(role: Role, classes: list[Path]) -> Path | None:
    """The folder to take where these are splits, each of class folders and without own images."""
    words = {word for words in SPLITS.values() for word in words}
    if not classes or any(f.name.lower() not in words for f in classes):
        return None
    if any(_has_image(f) or not _has_class(f) for f in classes):
        return None
    fitting = [f for word in SPLITS[role] for f in classes if f.name.lower() == word]
    return (fitting or classes)[0]


def _has_image(folder: Path) -> bool:
    return any(f.is_file() and f.suffix.lower() in EXTENSIONS for f in _visible(folder))


def _has_class(folder: Path) -> bool:
    return any(f.is_dir() and any(True for _ in _files(f, ())) for f in _visible(folder))


def _tell_others(option: str, others: list[Path], findings: Findings) -> None:
    by_extension: dict[str, list[str]] = {}
    for path in others:
        by_extension.setdefault(path.suffix.lower() or "no extension", []).append(path.name)
    parts = [
        f"{len(names)} {extension} ({listed(sorted(names)[:3])})"
        for extension, names in sorted(by_extension.items())
    ]
    findings.remark(f"{option}: files that are not read as images: {', '.join(parts)}")
