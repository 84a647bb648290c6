"""What stands on the page, and the page itself from its template; names and texts are escaped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from mts_fast._files import replaced_file, writing
from mts_fast.pipeline.decode import open_pixels
from mts_fast.pipeline.outcome import Outcome
from mts_fast.pipeline.records import METRICS, read_records
from mts_fast.pipeline.report.pictures import loss_curves, thumbnail, weight_curves
from mts_fast.pipeline.report.reasons import Reasons, explain
from mts_fast.pipeline.report.verdict import arm_rows, verdict
from mts_fast.pipeline.score import TrainedSelector, rank_correlation

REPORT = "report.html"
TEMPLATE = "report.html.j2"
# of each class at either end
GALLERY = 6
MOST_CLASSES = 20
MOST_SUSPECTS = 24
MOST_COPIES = 50
# characters of a text
EXCERPT = 280
# below this probability of its label under the classifier of the clean data, a label is suspected
SUSPECTED = 0.1
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Sample:
    """A sample as the page shows it: a picture's address, or an excerpt of its text."""

    file: str
    label: str
    role: str
    weight: float
    picture: str | None
    text: str | None
    reasons: list[str]


@dataclass(frozen=True)
class WeightsOf:
    """Weights of one class of one source."""

    label: str
    source: str
    role: str
    count: int
    mean: float
    quantiles: tuple[float, ...]


class Samples:
    """The samples of a run, to be shown."""

    def __init__(self, outcome: Outcome, reasons: Reasons) -> None:
        self.outcome = outcome
        self.reasons = reasons
        self._texts = outcome.texts()
        if self._texts is None:
            self._pixels = open_pixels(outcome.folder / outcome.store)

    def show(self, index: int) -> Sample:
        """The sample of a row of the table of weights."""
        row, member = self.outcome.rows[index], int(self.outcome.tensors["members"][index])
        picture = text = None
        if self._texts is None:
            picture = thumbnail(self._pixels[member])
        else:
            whole = self._texts[member]
            text = whole if len(whole) <= EXCERPT else f"{whole[:EXCERPT]} …"
        reasons = self.reasons.of(index)
        return Sample(row.file, row.label, row.role, row.weight, picture, text, reasons)


def write_report(outcome: Outcome, path: Path) -> Path:
    """Write the page, a file that needs nothing beside it.

    Raises:
        ValueError: stages of the run are gone or broken.
        OSError: it cannot be written.
    """
    trained = TrainedSelector(outcome)
    reasons = explain(trained)
    samples = Samples(outcome, reasons)
    weights = torch.tensor([row.weight for row in outcome.rows], dtype=torch.float64)
    rows, of_run = arm_rows(outcome), {*outcome.stages.values()}
    # the log has records of earlier options, too
    records = [r for r in read_records(outcome.folder / METRICS) if r.get("folder") in of_run]
    scores = trained.weights(trained.pool_inputs(), trained.labels, trained.is_synthetic)
    shown, table = _largest_classes(outcome), weights_by_source(outcome, weights)
    context: dict[str, Any] = {
        "name": outcome.folder.resolve().name,
        "verdict": verdict(rows),
        "arms": rows,
        "held_out": outcome.held_out,
        "count": len(outcome.tensors["held_out"]),
        "losses": loss_curves(records),
        "figure": weight_curves(records),
        "weights": table,
        "largest_mean": max(row.mean for row in table) or 1.0,
        "galleries": [(label, *_ends(samples, weights, label)) for label in shown],
        "classes": outcome.classes,
        "suspects": _suspects(outcome, samples),
        "importances": reasons.importances(),
        "agreement": rank_correlation(scores, weights),
        "copies": outcome.copies[:MOST_COPIES],
        "more_copies": max(0, len(outcome.copies) - MOST_COPIES),
        "remarks": outcome.remarks,
        "environment": outcome.environment,
        "config": outcome.config,
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    html = pages.get_template(TEMPLATE).render(context)
    with replaced_file("report", path) as part, writing("report", path):
        # file names that are no UTF-8 are shown with a replacement
        part.write_text(html, encoding="utf-8", errors="replace")
    return path


def weights_by_source(outcome: Outcome, weights: Tensor) -> list[WeightsOf]:
    """Weights by class and source, in the order of the classes."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, row in enumerate(outcome.rows):
        groups.setdefault((row.label, row.role, row.source), []).append(i)
    table = []
    for (label, role, source), indices in sorted(groups.items()):
        values = weights[indices]
        quantiles = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype)).tolist()
        mean = float(values.mean())
        table.append(WeightsOf(label, source, role, len(indices), mean, tuple(quantiles)))
    return table


def _largest_classes(outcome: Outcome) -> list[str]:
    """Classes with the most synthetic samples, in the order of the classes."""
    counts = dict.fromkeys(outcome.classes, 0)
    for row in outcome.rows:
        counts[row.label] += row.role == "synthetic"
    largest = sorted(counts, key=lambda label: -counts[label])[:MOST_CLASSES]
    return [label for label in outcome.classes if label in largest and counts[label]]


def _ends(samples: Samples, weights: Tensor, label: str) -> tuple[list[Sample], list[Sample]]:
    """The highest- and the lowest-weighted synthetic samples of a class, none of them in both."""
    rows = samples.outcome.rows
    members = [i for i, r in enumerate(rows) if r.label == label and r.role == "synthetic"]
    order = sorted(members, key=lambda i: -float(weights[i]))
    count = min(GALLERY, (len(order) + 1) // 2)
    low = order[max(count, len(order) - GALLERY) :]
    return [samples.show(i) for i in order[:count]], [samples.show(i) for i in reversed(low)]


def _suspects(outcome: Outcome, samples: Samples) -> list[tuple[Sample, str, float, float]]:
    """Samples whose label the classifier of the clean data finds unlikely, the least likely first:
    what it predicts, how sure, and the probability of the label."""
    tensors = outcome.tensors
    wrong = (tensors["predicted"] != tensors["labels"]) & (tensors["clean"] < SUSPECTED)
    order = sorted(wrong.nonzero().flatten().tolist(), key=lambda i: float(tensors["clean"][i]))
    return [
        (
            samples.show(i),
            outcome.classes[int(tensors["predicted"][i])],
            float(tensors["confidence"][i]),
            float(tensors["clean"][i]),
        )
        for i in order[:MOST_SUSPECTS]
    ]
