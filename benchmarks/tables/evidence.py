"""Tables of the demo's committed runs and studies."""

import json
from pathlib import Path
from typing import Any

from mts_fast.demo.summary import OURS, WITHOUT, cell, strongest_baseline

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"
# data sets whose ten seeds are there
DATA = {
    "coloured-digits": "coloured digits",
    "coloured-fashion": "coloured fashion",
    "fashion": "planted failures",
}
STUDIES = (
    *("features-coloured-fashion", "batch-size-coloured-fashion"),
    *("validation-size-coloured-digits", "bad-share-coloured-digits"),
    *("selector-every-coloured-digits", "embeddings-coloured-digits"),
)
# arms of README.md
SHOWN = (
    *("everything alike", "real + validation", "filter twice", "likely if clean, not easy"),
    *("MTS itself", OURS, WITHOUT, "oracle"),
)


def _record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "results.json").read_text())


def markdown_table(columns: list[str], lines: list[list[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join(head + [f"| {' | '.join(line)} |" for line in lines])


def demo_table(name: str) -> str:
    """All arms of one data set."""
    names = {
        "accuracy": "test accuracy %",
        "worst_group": "worst group %",
        "auc": "AUC of the weights",
        "ahead": f"{OURS} ahead by",
    }
    rows = _record(name)["summary"]
    used = [key for key in names if any(key in row for row in rows.values())]
    lines = [
        [
            arm,
            *(cell(row, key, digits=2 if key == "auc" else 1) for key in used),
            f"{row['seconds']:.0f}",
        ]
        for arm, row in rows.items()
    ]
    return markdown_table(["trained on", *(names[key] for key in used), "seconds"], lines)


def summary_table(_: str) -> str:
    """Accuracy of some arms on all data sets."""
    summaries = [_record(data)["summary"] for data in DATA]
    lines = [[arm, *(cell(rows.get(arm, {}), "accuracy") for rows in summaries)] for arm in SHOWN]
    return markdown_table(["trained on", *DATA.values()], lines)


def ahead_table(_: str) -> str:
    """How far the recipe is ahead of the strongest baseline, and of itself without MTS."""
    lines = []
    for data, title in DATA.items():
        rows = _record(data)["summary"]
        best = strongest_baseline(rows)
        cells = [cell(rows[arm], "ahead") for arm in (best, WITHOUT, "oracle")]
        lines.append([title, best, *cells])
    columns = ["", "strongest baseline", "ahead of it", "ahead of the recipe without MTS"]
    return markdown_table([*columns, "ahead of the oracle"], lines)


def study_table(name: str) -> str:
    """Accuracy of arms by the variant of a study."""
    summary = _record(name)["summary"]
    first = next(iter(summary.values()))
    has_gsnr = all("gsnr" in rows.get("MTS itself", {}) for rows in summary.values())
    lines = []
    for label, rows in summary.items():
        cells = [cell(rows[arm], "accuracy") for arm in first]
        cells += [f"{rows['MTS itself']['gsnr']:.2f}"] if has_gsnr else []
        lines.append([label, *cells])
    return markdown_table(["", *first, *(["GSNR within a batch"] if has_gsnr else [])], lines)


def gsnr_table(name: str) -> str:
    """GSNR by selector batch, in two ways."""
    rows = _record(name)["rows"]
    sizes = [str(row["batch_size"]) for row in rows]
    keys = {"over draws of the batch": "gsnr_over_draws", "within a batch": "gsnr_within_batch"}
    lines = [[label, *(f"{row[key]:.2f}" for row in rows)] for label, key in keys.items()]
    return markdown_table(["selector batch", *sizes], lines)
