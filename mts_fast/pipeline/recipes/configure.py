"""The configuration of a run by a recipe: its options, its data, and what overrides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mts_fast.pipeline.config import Config, load_config
from mts_fast.pipeline.data import Findings, Role
from mts_fast.pipeline.recipes.layout import absence_words, data_folder, place_of, weights_in
from mts_fast.pipeline.recipes.recipe import Recipe, load_recipe


def configure(
    name: str,
    data: str | None,
    options: Mapping[str, Any],
    file: str | None,
    assignments: Sequence[str],
) -> Config:
    """A recipe's configuration; the TOML file, assignments and options win over it, in that order.

    Args:
        name: of the recipe.
        data: the folder of its layout; None: options name the samples of every role.
        options, file, assignments: as for `load_config`.

    Raises:
        ValueError: no such recipe or folder, mistakes in options; samples or weights that the
            recipe needs and that are neither in the folder nor named by an option, all at once.
    """
    recipe = load_recipe("train", "--recipe", name)
    folder = None if data is None else data_folder("train", recipe, data)
    # where each role's samples lie, or would lie; empty ones are refused below
    places: dict[str, str] = dict.fromkeys(recipe.parts, "")
    if folder is not None:
        for role, part in recipe.parts.items():
            place = place_of(folder, part, of_texts=recipe.of_texts)
            places[role] = str(place or folder / part.path)
    defaults: dict[str, Any] = {**recipe.options, **places, "synthetic": [places["synthetic"]]}
    config = load_config(file, options, assignments, defaults)
    findings = Findings()
    for role in recipe.parts:
        if config.model_dump()[role] in (places[role], (places[role],)):
            _check_place(recipe, role, folder, findings)
    config = _with_weights(config, recipe, folder, findings)
    findings.raise_errors()
    return config if config.test else config.model_copy(update={"test": None})


def _check_place(recipe: Recipe, role: Role, folder: Path | None, findings: Findings) -> None:
    """A role that no option names must be in the folder; without a folder, the test set alone may
    be left out."""
    part = recipe.parts[role]
    if folder is None:
        if role != "test":
            do = f"pass --{role}, or --data FOLDER as `mts-fast recipe {recipe.name}` has it"
            findings.stop(f"no --{role}, which is to hold {part.holds}", do)
    elif place_of(folder, part, of_texts=recipe.of_texts) is None:
        what = f"--data {str(folder)!r} has {absence_words(part, of_texts=recipe.of_texts)}"
        findings.stop(what, f"it is to hold {part.holds}; put it there, or pass --{role}")


def _with_weights(
    config: Config, recipe: Recipe, folder: Path | None, findings: Findings
) -> Config:
    """The recipe's model starts from the recipe's weights; another one from what options say."""
    weights = recipe.weights
    if weights is None or config.pretrained is not None or config.model != recipe.options["model"]:
        return config
    file = None if folder is None else weights_in(folder, recipe)
    if file is None:
        names = " or ".join(weights.files)
        where = "no --pretrained" if folder is None else f"--data {str(folder)!r} has no {names}"
        do = "pass --pretrained FILE, or --model for another model"
        findings.stop(f"{where}, which is to hold {weights.holds}", do)
        return config
    return config.model_copy(update={"pretrained": str(file)})
