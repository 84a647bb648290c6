"""Means, standard errors and paired differences over seeds; which baseline is the strongest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from mts_fast.demo.arms import ARMS
from mts_fast.demo.jobs import JobResult

# the arm that all others are compared with
OURS = "MTS weights"
# the same recipe from other weights: what of the gain is not MTS's
WITHOUT = "the recipe without MTS"


def summarize(results: Sequence[JobResult]) -> dict[str, dict[str, Any]]:
    """By arm: accuracy and worst group in percent, AUC, seconds; mean and standard error.

    `ahead` is OURS minus the arm in percentage points, paired by seed. A standard error of one
    seed is None.
    """
    rows: dict[str, dict[str, Any]] = {}
    for arm in (arm for arm in ARMS if arm in results[0].accuracy):
        row: dict[str, Any] = {"seconds": statistics.mean(r.seconds[arm] for r in results)}
        columns = {
            "accuracy": [100 * r.accuracy[arm] for r in results],
            "worst_group": [100 * r.worst_group[arm] for r in results if arm in r.worst_group],
            "auc": [r.auc[arm] for r in results if arm in r.auc],
        }
        if arm != OURS and OURS in results[0].accuracy:
            columns["ahead"] = [100 * (r.accuracy[OURS] - r.accuracy[arm]) for r in results]
        for name, values in columns.items():
            if values:
                row[name] = statistics.mean(values)
                row[f"{name}_se"] = standard_error(values)
        rows[arm] = row
    return rows


def cell(row: dict[str, Any], name: str, sign: str = "±", digits: int = 1) -> str:
    """Mean and standard error of a column as text; empty where the row lacks it."""
    if name not in row:
        return ""
    error = row[f"{name}_se"]
    mean = f"{row[name]:.{digits}f}"
    return mean if error is None else f"{mean} {sign} {error:.{digits}f}"


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None of one value."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def strongest_baseline(rows: dict[str, dict[str, Any]]) -> str:
    """The baseline with the highest mean accuracy."""
    baselines = [arm for arm in rows if ARMS[arm].role == "baseline"]
    return max(baselines, key=lambda arm: rows[arm]["accuracy"])
