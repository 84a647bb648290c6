"""Tables of docs/sampling.md: price, quality of gradients, and accuracy of sampled steps."""

import json
from pathlib import Path
from typing import Any

from evidence import markdown_table

from mts_fast.demo.summary import cell

RESULTS = Path(__file__).resolve().parents[1] / "results"
DATA = {
    "coloured-fashion": "coloured fashion",
    "fashion": "planted failures",
    "digits": "digits",
}
# data sets whose ten seeds are there
TRAINED = ("coloured-fashion", "fashion", "digits")
MEASURED = ("fashion", "digits", "coloured-fashion")


def _study(name: str, data: str) -> dict[str, Any]:
    return json.loads((RESULTS / "evidence" / f"{name}-{data}" / "results.json").read_text())


def price_table(_: str) -> str:
    """Time of a step over the plain one, arms by models; peak memory below."""
    record = json.loads((RESULTS / "sampled_step.json").read_text())
    runs = {row["name"].split("[")[1].rstrip("]"): row["rows"] for row in record["rows"]}
    arms = list(max(runs.values(), key=len))
    lines = []
    for value, unit in (("time", ""), ("peak_mib", ": peak MiB")):
        for arm in arms:
            values = [rows.get(arm, {}).get(value, "") for rows in runs.values()]
            cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in values]
            lines.append([arm + unit, *cells])
    return markdown_table(["", *(name.replace("_", " ") for name in runs)], lines)


def gradient_table(_: str) -> str:
    """GSNR and error by batch and computed samples, for each data set."""
    by_data = [_study("sampled-gradient", data)["rows"] for data in MEASURED]
    lines = []
    for rows in zip(*by_data, strict=True):
        first = rows[0]
        size, k = first["candidates"], first["computed"]
        label = f"all of {size}" if k is None else f"{k} of {size}"
        cells = [f"{row[key]:.2f}" for row in rows for key in ("gsnr", "classifier_error")]
        lines.append([label, str(first["cost"]), *cells])
    columns = [f"{DATA[data]}: {value}" for data in MEASURED for value in ("GSNR", "error")]
    return markdown_table(["computed", "cost", *columns], lines)


def accuracy_table(_: str) -> str:
    """Accuracy of MTS itself and of the retrained model, by what each step computes."""
    lines = []
    for data in TRAINED:
        for label, rows in _study("sampled", data)["summary"].items():
            cells = [cell(rows[arm], "accuracy") for arm in ("MTS itself", "MTS weights")]
            lines.append([DATA[data], _with_mean(label, rows["MTS itself"]), *cells])
    return markdown_table(["", "computed of a batch", "MTS itself", "retrained"], lines)


def _with_mean(label: str, row: dict[str, Any]) -> str:
    """The label of a variant; where the library picked k, with its mean."""
    return f"{label} ({row['computed']:.0f} on average)" if label.startswith("auto") else label
