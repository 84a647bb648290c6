"""`mts-fast select`: the samples that a finished run recommends, as files that other tools read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import replaced_file, save_tensors, writing
from mts_fast._outputs import output_folder
from mts_fast.pipeline.data.hub import PREFIX
from mts_fast.pipeline.outcome import Outcome, Row, write_csv

OP = "select"
CSV, PARQUET, SAMPLER = "selected.csv", "selected.parquet", "sampler.safetensors"


@dataclass(frozen=True)
class Selection:
    """Which rows of a run's table were chosen [M], and how many of the candidates by class."""

    chosen: Tensor  # bool
    candidates: Counter[str]
    selected: Counter[str]


def choose(
    outcome: Outcome,
    *,
    keep: float | None = None,
    threshold: float | None = None,
    per_class: bool = False,
    with_real: bool = True,
) -> Selection:
    """Choose synthetic samples by weight; of equal weights the first in the table.

    Args:
        keep: share of the candidates, in (0, 1]; the number is rounded, and 1 at least.
        threshold: least weight.
        per_class: `keep` of each class instead of all of them.
        with_real: the real samples are chosen, too, all of them.

    Raises:
        ValueError: not one of keep and threshold, out of range, or nothing is left.
    """
    if (keep is None) == (threshold is None):
        got = "neither" if keep is None else "both"
        fail(ValueError, OP, "--keep or --threshold", "given, one of them", got, "pass one")
    if keep is not None and not 0 < keep <= 1:
        percent = 1 < keep <= 100
        hint = f"write {keep:g} % as {keep / 100:g}" if percent else "0.5 keeps the better half"
        fail(ValueError, OP, "--keep", "a share above 0 and up to 1", keep, hint)
    if per_class and keep is None:
        hint = "a threshold is the same for every class already"
        fail(ValueError, OP, "--per-class", "used with --keep", "--threshold", hint)
    weights = torch.tensor([row.weight for row in outcome.rows], dtype=torch.float64)
    candidates = torch.tensor([row.role == "synthetic" for row in outcome.rows])
    if threshold is not None:
        chosen = candidates & (weights >= threshold)
    else:
        assert keep is not None
        chosen = _best_share(weights, outcome.tensors["labels"], candidates, keep, per_class)
    if not chosen.any():
        best = float(weights[candidates].max())
        hint = f"the highest weight is {best:.4g}; pass a lower one"
        fail(ValueError, OP, "--threshold", "reached by some sample", threshold, hint)
    selected = Counter(outcome.rows[i].label for i in chosen.nonzero().flatten().tolist())
    of_class = Counter(row.label for row in outcome.rows if row.role == "synthetic")
    return Selection(chosen | ~candidates if with_real else chosen, of_class, selected)


def _best_share(
    weights: Tensor, labels: Tensor, candidates: Tensor, keep: float, per_class: bool
) -> Tensor:
    chosen = torch.zeros_like(candidates)
    groups = labels.unique().tolist() if per_class else [None]
    for group in groups:
        members = candidates if group is None else candidates & (labels == group)
        indices = members.nonzero().flatten()
        if not len(indices):
            continue
        order = weights[indices].argsort(descending=True, stable=True)
        chosen[indices[order[: max(1, round(keep * len(indices)))]]] = True
    return chosen


def write_selection(outcome: Outcome, selection: Selection, out: Path) -> list[Path]:
    """Write the chosen samples, in the order of the table of weights.

    selected.csv (and .parquet, where pyarrow is installed) has columns file, label, weight, role,
    source, and that of the texts for a run on texts: `mts-fast train` and Hugging Face's datasets
    read it. Weights of the sampler are those of the synthetic samples, and 1 of the real ones.

    Returns:
        the files.

    Raises:
        OSError: they cannot be written.
    """
    indices = selection.chosen.nonzero().flatten().tolist()
    rows = [outcome.rows[i] for i in indices]
    texts, members = outcome.texts(), outcome.tensors["members"].tolist()
    columns: dict[str, list[Any]] = {
        "file": [_place(row, texts is not None) for row in rows],
        "label": [row.label for row in rows],
        "weight": [row.weight for row in rows],
        "role": [row.role for row in rows],
        "source": [row.source for row in rows],
    }
    if texts is not None:
        columns[_text_column(outcome, columns)] = [texts[members[i]] for i in indices]
    with output_folder(OP, "--out", out):
        write_csv(OP, out / CSV, list(columns), zip(*columns.values(), strict=True))
        paths = [out / CSV]
        parquet = _write_parquet(out / PARQUET, columns)
        if parquet is not None:
            paths.append(parquet)
        weights = torch.tensor([r.weight if r.role == "synthetic" else 1.0 for r in rows])
        labels = outcome.tensors["labels"][selection.chosen]
        synthetic = torch.tensor([row.role == "synthetic" for row in rows])
        path = out / SAMPLER
        tensors = {"weights": weights.double(), "labels": labels, "is_synthetic": synthetic}
        save_tensors(OP, path, tensors, {"format": "mts_fast.sampler"})
        return [*paths, path]


def _text_column(outcome: Outcome, others: dict[str, Any]) -> str:
    """The column of texts as the lists of the run have it, so that both are read alike."""
    name = str(outcome.config["text_column"] or "text")
    return "text" if name in others else name


def _place(row: Row, is_text: bool) -> str:
    """An image's path; of a text, or a row of a data set, its name in that."""
    in_dataset = row.path.startswith(PREFIX) or Path(row.path).is_dir()
    return row.file if is_text or in_dataset else row.path


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path | None:
    """None without pyarrow, or where a file name is no UTF-8, which Parquet cannot hold; an older
    file, which would be of another selection, goes."""
    path.unlink(missing_ok=True)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    try:
        table = pyarrow.table(columns)
    except UnicodeEncodeError:
        return None
    with replaced_file(OP, path) as part, writing(OP, path):
        parquet.write_table(table, part)
    return path
