"""`mts-fast train`: the options of the command line, the run, and a table of what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mts_fast._check import fail
from mts_fast.demo.tables import print_table
from mts_fast.pipeline.config import Config, load_config
from mts_fast.pipeline.outcome import WEIGHTS
from mts_fast.pipeline.recipes.configure import configure
from mts_fast.pipeline.run import Run
from mts_fast.pipeline.team import team_of


def run_train(
    options: Mapping[str, Any],
    config: str | None,
    assignments: Sequence[str],
    out: str,
    recipe: str | None = None,
    data: str | None = None,
) -> int:
    """Load the options, run all stages, print the accuracies."""
    if not out:
        fail(ValueError, "train", "--out", "a folder", "''", "name one, or leave it out")
    team = team_of("train")
    settings = team.led(lambda: _load(options, config, assignments, recipe, data))
    # the first process alone speaks
    console = Console(stderr=True) if team.leads else Console(quiet=True, force_terminal=False)
    outcome = Run(settings, Path(out), console, team).execute()
    if outcome is None:
        return 0
    console = Console()
    rows = [
        [name, *(f"{100 * value:.1f}" for value in figures.values())]
        for name, figures in outcome.arms.items()
    ]
    names = ["accuracy", "worst group"][: len(rows[0]) - 1]
    print_table(console, f"{outcome.held_out} accuracy %", ["trained on", *names], rows)
    console.print(f"Weights of all samples: {Path(out) / WEIGHTS}", markup=False)
    return 0


def _load(
    options: Mapping[str, Any],
    config: str | None,
    assignments: Sequence[str],
    recipe: str | None,
    data: str | None,
) -> Config:
    if recipe is not None:
        return configure(recipe, data, options, config, assignments)
    if data is not None:
        hint = "name one of `mts-fast recipe`, or pass --real, --synthetic, --val and --test"
        fail(ValueError, "train", "--data", "given with --recipe", f"{data!r} alone", hint)
    return load_config(config, options, assignments)
