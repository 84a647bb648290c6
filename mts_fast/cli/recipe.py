"""`mts-fast recipe`: which recipes there are, what data they expect, and what of it is there."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from mts_fast._check import fail
from mts_fast.demo.tables import print_table
from mts_fast.pipeline.data import ROLES, Role
from mts_fast.pipeline.recipes import Recipe, load_recipe, recipe_names
from mts_fast.pipeline.recipes.check import Inventory, take_inventory
from mts_fast.pipeline.recipes.layout import data_folder, place_words
from mts_fast.pipeline.recipes.originals import write_lists

# exit status where some data are missing
INCOMPLETE = 2


def run_recipe(name: str | None, data: str | None, prepare: str | None) -> int:
    """List the recipes, describe one, or check its data; 2 where some of them are missing."""
    console = Console()
    for flag, value, needs in (("--data", data, name), ("--prepare", prepare, data)):
        if value is not None and needs is None:
            expected = f"given with {'NAME' if flag == '--data' else '--data'}"
            hint = "write `mts-fast recipe NAME --data FOLDER`"
            fail(ValueError, "recipe", flag, expected, f"{value!r} alone", hint)
    if name is None:
        rows = [
            [known, load_recipe("recipe", "NAME", known).description] for known in recipe_names()
        ]
        print_table(console, "recipes", ["recipe", "what it is of"], rows)
        return 0
    recipe = load_recipe("recipe", "NAME", name)
    if data is None:
        _describe(console, recipe)
        return 0
    if prepare is not None and data:
        for path, count in write_lists(recipe, prepare, Path(data).expanduser()).items():
            _say(console, f"wrote {path}: {count} images")
    folder = data_folder("recipe", recipe, data)
    inventory = take_inventory(recipe, folder)
    _report(console, recipe, inventory)
    if inventory.findings.errors:
        return INCOMPLETE
    command = ["mts-fast", "train", "--recipe", recipe.name, "--data", data]
    _say(console, f"Complete. {shlex.join([*command, '--out', f'runs/{recipe.name}'])}")
    return 0


def _describe(console: Console, recipe: Recipe) -> None:
    _say(console, f"{recipe.name}: {recipe.description}", "", "Below the folder of the data:")
    for role, part in recipe.parts.items():
        _say(console, f"  {role}: {place_words(part, of_texts=recipe.of_texts)}")
        _say(console, f"    {part.holds}", f"    from: {part.source}")
        content = recipe.options.get("text_column", "file")
        columns = f"{content},label{',group' if part.groups else ''}"
        _say(console, f"    columns of the list: {columns}")
    if recipe.weights is not None:
        _say(console, f"  weights: {' or '.join(recipe.weights.files)}")
        _say(console, f"    {recipe.weights.holds}", f"    from: {recipe.weights.source}")
    classes = ", ".join(recipe.classes) or "those of the real samples"
    _say(console, f"Classes: {classes}", "", "Options:")
    _say(console, *(f"  {key} = {value}" for key, value in recipe.options.items()))
    _say(console, "", "Notes:", *(f"- {note}" for note in recipe.notes))


def _report(console: Console, recipe: Recipe, inventory: Inventory) -> None:
    roles: list[Role] = [role for role in ROLES if role in inventory.samples]
    for role, place in inventory.places.items():
        _say(console, f"{role}: {place}")
    if inventory.weights is not None:
        _say(console, f"weights: {inventory.weights}")
    if roles:
        counts = {role: inventory.samples[role].counts() for role in roles}
        rows = [[label, *(str(counts[r][label]) for r in roles)] for label in inventory.classes()]
        rows.append(["all", *(str(len(inventory.samples[role])) for role in roles)])
        title = f"{'texts' if recipe.of_texts else 'images'} by class"
        print_table(console, title, ["class", *roles], rows)
    groups = inventory.groups()
    if groups:
        names = sorted({name for counts in groups.values() for name in counts})
        rows = [[name, *(str(counts[name]) for counts in groups.values())] for name in names]
        print_table(console, "images by group", ["group", *groups], rows)
    for remark in inventory.findings.remarks:
        _say(console, f"note: {remark}")
    if inventory.findings.errors:
        _say(console, "Missing or wrong:", *(f"- {e}" for e in inventory.findings.errors))


def _say(console: Console, *lines: str) -> None:
    """Lines as they are, for a terminal or a pipe."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
