"""What a recipe is, and reading it from its TOML file."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib import resources
from typing import Any

import pydantic

from mts_fast._check import fail
from mts_fast.pipeline.data import Role

# has no layout: what recipes of published runs share
BASES = ("published",)


class Part(pydantic.BaseModel):
    """The samples of one role, below the folder of the data."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    path: str  # of a folder of class folders, or of a list without its extension
    holds: str
    source: str
    groups: bool = False  # whether the worst group is worth knowing


class Weights(pydantic.BaseModel):
    """A file to start the model from, beside the data."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    files: tuple[str, ...]  # patterns, the preferred one first
    holds: str
    source: str


class Recipe(pydantic.BaseModel):
    """A recipe; `options` are those of Config, all but the places of the data."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    options: dict[str, Any]
    parts: dict[Role, Part]
    notes: tuple[str, ...]
    classes: tuple[str, ...] = ()  # none: those of the real samples
    weights: Weights | None = None
    original: str | None = None  # which reader of originals.py makes lists

    @property
    def of_texts(self) -> bool:
        """Whether its samples are texts, which stand in lists alone."""
        return "text_column" in self.options


def load_recipe(op: str, arg: str, name: str) -> Recipe:
    """The recipe of a name.

    Args:
        op, arg: the command and its argument that names the recipe, for the message.

    Raises:
        ValueError: there is none, with the nearest name.
    """
    names = recipe_names()
    if name in names:
        return _all_recipes()[name]
    variants = [known for known in names if known.startswith(f"{name.lower()}-")]
    nearest = variants or difflib.get_close_matches(name.lower(), names, n=1)
    meant = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    hint = f"{meant}`mts-fast recipe` lists them"
    fail(ValueError, op, arg, f"one of {', '.join(names)}", repr(name), hint)


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes, sorted."""
    return tuple(sorted(_all_recipes()))


@cache
def _all_recipes() -> dict[str, Recipe]:
    files = {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8"))
        for file in resources.files(__package__).iterdir()
        if file.name.endswith(".toml")
    }
    recipes = {}
    for name, content in files.items():
        if name in BASES:
            continue
        variants = content.pop("variants", {})
        based = _on_base(content, files.get(content.pop("base", ""), {}))
        if not variants:
            recipes[name] = Recipe(name=name, **based)
        for variant, of_variant in variants.items():
            options = based["options"] | of_variant["options"]
            filled = _filled({**based, "options": options}, of_variant["words"])
            recipes[f"{name}-{variant}"] = Recipe(name=f"{name}-{variant}", **filled)
    return recipes


def _on_base(content: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    options = base.get("options", {}) | content["options"]
    notes = [*content.get("notes", ()), *base.get("notes", ())]
    return {**base, **content, "options": options, "notes": notes}


def _filled(value: Any, words: dict[str, str]) -> Any:
    """The words of a variant in place of their names in braces, in every string."""
    if isinstance(value, dict):
        return {key: _filled(one, words) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, words) for one in value]
    return value.format(**words) if isinstance(value, str) else value
