"""`mts-fast select` and `mts-fast score`: what a finished run says of samples, old and new."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from mts_fast._check import fail
from mts_fast.demo.tables import print_table
from mts_fast.pipeline.outcome import Outcome, load_outcome, output_file, write_rows
from mts_fast.pipeline.score import Scores, score_samples
from mts_fast.pipeline.select import choose, write_selection
from mts_fast.pipeline.team import team_of


def run_select(
    run: str,
    keep: float | None,
    threshold: float | None,
    out: str | None,
    *,
    per_class: bool,
    with_real: bool,
) -> int:
    """Choose, write, and print how many of each class."""
    if out == "":
        fail(ValueError, "select", "--out", "a folder", "''", "name one, or leave it out")
    outcome = load_outcome("select", Path(run))
    selection = choose(
        outcome, keep=keep, threshold=threshold, per_class=per_class, with_real=with_real
    )
    paths = write_selection(
        outcome, selection, Path(run) / "selected" if out is None else Path(out)
    )
    console = Console()
    rows = [
        [label, str(selection.candidates[label]), str(selection.selected[label])]
        for label in outcome.classes
    ]
    total = [str(selection.candidates.total()), str(selection.selected.total())]
    rows.append(["all", *total])
    print_table(console, "synthetic samples", ["class", "candidates", "selected"], rows)
    empty = [label for label in outcome.classes if not selection.selected[label]]
    if empty:
        names = ", ".join(map(repr, empty))
        print_note(f"no synthetic sample of {names} is selected; --keep with --per-class has some")
    for path in paths:
        console.print(f"Written: {path}", markup=False, soft_wrap=True)
    return 0


def run_score(run: str, synthetic: Sequence[str], out: str | None, on_corrupt: str | None) -> int:
    """Weigh new samples, write them as a table like the run's, and print means by class."""
    team = team_of("score")
    outcome = team.together(lambda: load_outcome("score", Path(run)))
    with ExitStack() as stack:
        place = output_file("score", outcome, out, "scores.csv")
        path = team.led(lambda: stack.enter_context(place))
        shared = path.parent if team.size > 1 else None
        scores = score_samples(outcome, synthetic, on_corrupt, print_note, team, shared)
        if scores is not None:
            write_rows("score", path, scores.rows)
            _print_scores(outcome, scores, path)
    return 0


def _print_scores(outcome: Outcome, scores: Scores, path: Path) -> None:
    console = Console()
    old = torch.tensor([row.weight for row in outcome.rows if row.role == "synthetic"])
    rows = []
    for label in outcome.classes:
        weights = [row.weight for row in scores.rows if row.label == label]
        if weights:
            rows.append([label, str(len(weights)), f"{sum(weights) / len(weights):.3f}"])
    every = [row.weight for row in scores.rows]
    rows.append(["all", str(len(every)), f"{sum(every) / len(every):.3f}"])
    rows.append(["of the run", str(len(old)), f"{float(old.mean()):.3f}"])
    print_table(console, "new samples", ["class", "samples", "mean weight"], rows)
    agreement = f"{scores.agreement:.2f}"
    console.print(
        f"Rank correlation of such scores with the weights of the run's samples: {agreement}",
        markup=False,
    )
    console.print(f"Written: {path}", markup=False, soft_wrap=True)


def print_note(text: str) -> None:
    """On stderr, as `train` has its notes."""
    Console(stderr=True).print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
