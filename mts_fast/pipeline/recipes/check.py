"""What of a recipe's data is there, by class and group, and what is missing."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mts_fast.pipeline.data import Findings, Role, Samples
from mts_fast.pipeline.data.findings import listed
from mts_fast.pipeline.data.folders import read_folder
from mts_fast.pipeline.data.lists import LIST_EXTENSIONS, read_list
from mts_fast.pipeline.recipes.layout import absence_words, place_of, weights_in
from mts_fast.pipeline.recipes.recipe import Part, Recipe

# a part that comes from where the real samples come from
SAME = "as real"


@dataclass(frozen=True)
class Inventory:
    """The data of a recipe below a folder.

    Attributes:
        places: of each role that has one.
        samples: of each role that could be read.
        weights: the file that the model starts from.
        findings: errors for what is missing or wrong, each with what to do; remarks.
    """

    places: dict[Role, Path]
    samples: dict[Role, Samples]
    weights: Path | None
    findings: Findings

    def classes(self) -> tuple[str, ...]:
        """Of all roles, sorted."""
        return tuple(sorted({c for s in self.samples.values() for c in _classes(s)}))

    def groups(self) -> dict[Role, Counter[str]]:
        """Samples of each group, of the roles that have groups."""
        groups = {role: of_role.groups for role, of_role in self.samples.items()}
        return {role: Counter(names) for role, names in groups.items() if names is not None}


def take_inventory(recipe: Recipe, folder: Path) -> Inventory:
    """Look at every part of a recipe below `folder`; images are counted, not opened."""
    findings = Findings()
    places: dict[Role, Path] = {}
    samples: dict[Role, Samples] = {}
    for role, part in recipe.parts.items():
        place = place_of(folder, part, of_texts=recipe.of_texts)
        if place is None:
            what = f"{role}: {absence_words(part, of_texts=recipe.of_texts)}"
            findings.stop(what, f"{part.holds}; from: {_source(recipe, part)}")
            continue
        places[role] = place
        of_role = _read(role, place, recipe, findings)
        if of_role is not None:
            samples[role] = of_role
    for role, of_role in samples.items():
        _check_classes(recipe, role, samples, findings)
        if recipe.parts[role].groups and of_role.groups is None:
            findings.remark(f"{role} has no groups: the worst group will not be reported")
    weights = weights_in(folder, recipe)
    if recipe.weights is not None and weights is None:
        w = recipe.weights
        findings.stop(f"weights: no {' or '.join(w.files)}", f"{w.holds}; from: {w.source}")
    return Inventory(places, samples, weights, findings)


def _read(role: Role, place: Path, recipe: Recipe, findings: Findings) -> Samples | None:
    if place.suffix.lower() in LIST_EXTENSIONS:
        return read_list(role, place, recipe.options.get("text_column"), findings)
    return read_folder(role, place, findings)


def _check_classes(
    recipe: Recipe, role: Role, samples: dict[Role, Samples], findings: Findings
) -> None:
    """Classes are those of the recipe, or else those of the real samples."""
    if not recipe.classes and "real" not in samples:
        return
    expected = {*recipe.classes} or _classes(samples["real"])
    of_role = samples[role]
    lacking = sorted(expected - {*of_role.labels})
    if lacking:
        part = recipe.parts[role]
        what = f"{role}: no samples of {len(lacking)} classes: {listed(lacking)}"
        findings.stop(what, f"{part.holds}; from: {_source(recipe, part)}")
    for label in sorted(_classes(of_role) - expected):
        nearest = difflib.get_close_matches(label, sorted(expected), n=1, cutoff=0)
        hint = f"rename it ({nearest[0]!r}?), or take it out" if nearest else "take it out"
        whose = "the recipe does" if recipe.classes else "the real samples do"
        findings.stop(f"{role}: class {label!r}, which {whose} not have", hint)


def _classes(samples: Samples) -> set[str]:
    return {*samples.labels, *samples.empty_classes}


def _source(recipe: Recipe, part: Part) -> str:
    """Where a part comes from, in full."""
    return recipe.parts["real"].source if part.source == SAME else part.source
