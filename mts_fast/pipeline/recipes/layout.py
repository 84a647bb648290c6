"""Where the parts of a recipe lie below the folder of the data."""

from __future__ import annotations

from pathlib import Path

from mts_fast._check import fail
from mts_fast.pipeline.data.lists import LIST_EXTENSIONS
from mts_fast.pipeline.recipes.recipe import Part, Recipe


def data_folder(op: str, recipe: Recipe, data: str) -> Path:
    """The folder of the data.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(data).expanduser()
    if not data or not folder.is_dir():
        got = f"no folder {data!r}" if not folder.exists() else repr(data)
        hint = f"`mts-fast recipe {recipe.name}` says what belongs there"
        fail(ValueError, op, "--data", "the folder of the recipe's data", got, hint)
    return folder


def place_of(folder: Path, part: Part, *, of_texts: bool) -> Path | None:
    """The list of a part, or else its folder of class folders; None where there is neither."""
    lists = [folder / f"{part.path}{extension}" for extension in LIST_EXTENSIONS]
    places = [place for place in lists if place.is_file()]
    if not of_texts and (folder / part.path).is_dir():
        places.append(folder / part.path)
    return places[0] if places else None


def place_words(part: Part, *, of_texts: bool) -> str:
    """Where a part belongs."""
    return f"{part.path}.csv" if of_texts else f"{part.path}.csv or the folder {part.path}/"


def absence_words(part: Part, *, of_texts: bool) -> str:
    """That a part is not where it belongs."""
    return f"no {part.path}.csv" if of_texts else f"no {part.path}.csv and no folder {part.path}/"


def weights_in(folder: Path, recipe: Recipe) -> Path | None:
    """The file of weights beside the data: the first that fits the preferred pattern."""
    if recipe.weights is None:
        return None
    files = [file for pattern in recipe.weights.files for file in sorted(folder.glob(pattern))]
    return files[0] if files else None
