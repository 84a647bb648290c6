"""Lists of samples from the folder of an original data set, as its authors pack it."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mts_fast._check import fail
from mts_fast._files import replaced_file, writing
from mts_fast.pipeline.data import Findings, Role
from mts_fast.pipeline.data.checks import split_validation
from mts_fast.pipeline.data.folders import read_folder
from mts_fast.pipeline.recipes.layout import place_of
from mts_fast.pipeline.recipes.recipe import Recipe

# of the target domain of PACS
VAL_SHARE = 0.1
SPLITS: tuple[Role, ...] = ("real", "val", "test")
# as original data sets count their splits
BY_NUMBER = dict(zip("012", SPLITS, strict=True))

# role, file, class, group
Row = tuple[Role, Path, str, str]


def write_lists(recipe: Recipe, original: str, folder: Path) -> dict[Path, int]:
    """Write lists of the real, validation and test samples into `folder`; parts that are there
    already are left alone.

    Returns:
        samples of each list that was written.

    Raises:
        ValueError: the recipe has no known original, or its files are not as their authors made
            them.
        FileNotFoundError: one of them is not there.
        OSError: a list cannot be written.
    """
    if recipe.original is None:
        hint = "make its lists yourself; `mts-fast recipe NAME` says what belongs there"
        got = f"recipe {recipe.name!r}, which has none"
        fail(ValueError, "recipe", "--prepare", "left out where no original is known", got, hint)
    rows = list(READERS[recipe.original](recipe, Path(original).expanduser().resolve()))
    written = {}
    for role in SPLITS:
        part = recipe.parts[role]
        if place_of(folder, part, of_texts=False) is None:
            path = folder / f"{part.path}.csv"
            of_role = [row for row in rows if row[0] == role]
            if not of_role:
                got = f"{original!r} without samples for {role}"
                hint = f"get it from: {recipe.parts['real'].source}"
                fail(ValueError, "recipe", "--prepare", "the whole original", got, hint)
            _write(path, of_role, groups=part.groups)
            written[path] = len(of_role)
    return written


def _write(path: Path, rows: Sequence[Row], *, groups: bool) -> None:
    """Paths start at the list's folder."""
    with writing("recipe", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replaced_file("recipe", path) as part,
        writing("recipe", path),
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["file", "label", "group"] if groups else ["file", "label"])
        for _, image, label, group in rows:
            name = Path(os.path.relpath(image, path.parent.resolve())).as_posix()
            writer.writerow([name, label, group] if groups else [name, label])


def _waterbirds(recipe: Recipe, original: Path) -> Iterator[Row]:
    """metadata.csv: y and place are 0 for land, split counts training, validation, test."""
    file = _file(recipe, original, "metadata.csv")
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, cells in enumerate(csv.DictReader(lines), start=2):
            try:
                role = BY_NUMBER[cells["split"]]
                label = dict(zip("01", recipe.classes, strict=True))[cells["y"]]
                place = {"0": "land", "1": "water"}[cells["place"]]
                yield role, original / cells["img_filename"], label, f"{label} on {place}"
            except (KeyError, TypeError) as error:
                _not_as_made(file, number, error)


def _celeba(recipe: Recipe, original: Path) -> Iterator[Row]:
    """A line of 1 and -1 for each image, and its partition, in files of their own."""
    roles = {}
    file = _file(recipe, original, "list_eval_partition.txt", "Eval")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            name, partition = line.split()
            roles[name] = BY_NUMBER[partition]
        except (KeyError, ValueError) as error:
            _not_as_made(file, number, error)
    file = _file(recipe, original, "list_attr_celeba.txt", "Anno")
    # the first line is the count, the second has the names
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines[2:], start=3):
        try:
            name, *values = line.split()
            flags = dict(zip(lines[1].split(), values, strict=True))
            label = recipe.classes[0 if flags["Blond_Hair"] == "1" else 1]
            group = f"{label} {'man' if flags['Male'] == '1' else 'woman'}"
            yield roles[name], original / "img_align_celeba" / name, label, group
        except (KeyError, ValueError) as error:
            _not_as_made(file, number, error)


def _pacs(recipe: Recipe, original: Path) -> Iterator[Row]:
    """A folder of class folders for each domain; a share of the target's for validation."""
    findings = Findings()
    real = read_folder("real", original / recipe.parts["real"].path, findings)
    target = original / Path(recipe.parts["test"].path).name
    images = read_folder("test", target, findings)
    if real is None or images is None:
        hint = "pass the folder that has a folder of class folders for each domain"
        got = "; ".join(findings.errors)
        fail(ValueError, "recipe", "--prepare", "the folder of PACS", got, hint)
    chosen = split_validation(images, VAL_SHARE, 0, Findings())
    test, val = images.without(chosen), images.only(chosen)
    for role, samples in zip(SPLITS, (real, val, test), strict=True):
        for path, label in zip(samples.contents, samples.labels, strict=True):
            yield role, Path(str(path)), label, ""


def _dtd(recipe: Recipe, original: Path) -> Iterator[Row]:
    """The first of ten splits: lists of CLASS/FILE."""
    for role, split in zip(SPLITS, ("train1.txt", "val1.txt", "test1.txt"), strict=True):
        file = _file(recipe, original, split, "labels")
        for name in file.read_text(encoding="utf-8").split():
            yield role, original / "images" / name, name.partition("/")[0], ""


READERS: dict[str, Callable[[Recipe, Path], Iterator[Row]]] = {
    "waterbirds": _waterbirds,
    "celeba": _celeba,
    "pacs": _pacs,
    "dtd": _dtd,
}


def _file(recipe: Recipe, original: Path, name: str, below: str = ".") -> Path:
    """A file of the original, in its folder or where its authors put it below."""
    for file in (original / name, original / below / name):
        if file.is_file():
            return file
    expected = f"the folder of the original data of {recipe.name}, with {name}"
    hint = f"get it from: {recipe.parts['real'].source}"
    fail(FileNotFoundError, "recipe", "--prepare", expected, f"{str(original)!r}", hint)


def _not_as_made(file: Path, number: int, error: Exception) -> NoReturn:
    got = f"{str(file)!r}, line {number} ({type(error).__name__}: {error})"
    hint = "get the file again, or make the lists yourself"
    fail(ValueError, "recipe", "--prepare", "an original as its authors made it", got, hint)
