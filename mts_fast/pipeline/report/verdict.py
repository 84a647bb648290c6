"""Did it pay: accuracies with intervals, paired differences, and one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mts_fast.pipeline.outcome import Outcome
from mts_fast.pipeline.stages import OURS

# of the standard normal distribution: 95 % lie within
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, in percent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ArmRow:
    """One arm of the table; `ahead`: how far training with the weights is ahead of it."""

    name: str
    accuracy: Interval
    worst_group: float | None
    ahead: Interval | None


def arm_rows(outcome: Outcome) -> list[ArmRow]:
    """The arms in the order of the run."""
    ours = outcome.tensors[f"right/{OURS}"].double()
    rows = []
    for name, figures in outcome.arms.items():
        right = outcome.tensors[f"right/{name}"].double()
        worst = figures.get("worst_group")
        ahead = None if name == OURS else paired_difference(ours, right)
        percent = None if worst is None else 100 * worst
        rows.append(ArmRow(name, wilson(int(right.sum()), len(right)), percent, ahead))
    return rows


def wilson(successes: int, count: int) -> Interval:
    """Wilson's score interval of a share."""
    share, z2 = successes / count, NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    half /= 1 + z2 / count
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(100 * share, 100 * low, 100 * high)


def paired_difference(a: Tensor, b: Tensor) -> Interval:
    """Mean of a - b [T] with a normal interval over the samples, both of the same samples."""
    difference = a - b
    mean = float(difference.mean())
    error = float(difference.std(correction=1)) / math.sqrt(len(difference)) if len(a) > 1 else 1.0
    half = NORMAL_95 * error
    return Interval(100 * mean, 100 * (mean - half), 100 * (mean + half))


def verdict(rows: list[ArmRow]) -> str:
    """Whether training with the weights is ahead of the strongest arm without them."""
    strongest = max((row for row in rows if row.ahead), key=lambda row: row.accuracy.value)
    ahead = strongest.ahead
    assert ahead is not None
    interval = f"95 % interval {ahead.low:+.1f} to {ahead.high:+.1f}"
    points = f"{abs(ahead.value):.1f} points ({interval})"
    beside = f"the strongest other training, “{strongest.name}”"
    if ahead.low > 0:
        return f"Selection paid: it is ahead of {beside}, by {points}."
    if ahead.high < 0:
        return f"Selection did not pay: it is behind {beside}, by {points}."
    if round(ahead.value, 1) == 0:
        return f"No difference is certain: selection is level with {beside} ({interval})."
    side = "ahead of" if ahead.value >= 0 else "behind"
    return f"No difference is certain: selection is {side} {beside}, by {points}."
