"""How many samples of a batch a step computes: all, a number, a share, or what pays best."""

from __future__ import annotations

import logging
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mts_fast._check import check_int, describe, fail
from mts_fast.distributed import Ranks
from mts_fast.sampling import check_number_of_samples, inclusion_probabilities, variance_ratio
from mts_fast.training.sampled.part import Sampled

OP = "MTSStep"
logger = logging.getLogger("mts_fast")
# the shares of M that "auto" picks from, and the one that it begins with
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
FIRST = 1 / 4
# "auto" decides anew in calls 8, 16, 32, ..., from sums that set out for the host this many calls
# before, so that nothing waits for them
FIRST_REVISION, AHEAD = 8, 2
# where "auto" computes everything, this many calls before a revision compute this share, so that
# there is something to decide by
EXPLORING_CALLS, EXPLORED = 4, 1 / 2
# passes over a sample: of a computed one (a forward and two backwards, of two forwards each), of
# one of an exact step, and of a validation sample (its features and its gradient)
COMPUTED, EXACT, VALIDATION = 5.0, 5.0, 4.0
# it looks at every call before the first revision, and at every so many later ones
LOOKS_EVERY = 4
# and never takes fewer samples: of a few, draws do not tell their variance
LEAST = 8
# computed samples of more than this many times the bound that c p has in row 3 are counted
FAR = 2.0


class Costs(NamedTuple):
    """What the price of a step depends on beside k."""

    passes: int  # forwards of all candidates in stage 1
    validation: float  # V / M

    def of(self, share: float) -> float:
        """Of a step that computes a share of its candidates, in forwards of all of them."""
        if share == 1.0:
            return EXACT + VALIDATION * self.validation
        return self.passes + COMPUTED * share + VALIDATION * self.validation


class ComputeChoice:
    """The number of computed samples, by the option `compute` of MTSStep.

    "auto" takes the share of the smallest price times variance: a step of half the variance is
    worth two. The variance of a share s relative to an exact step's is 1 + max(selector's,
    classifier's excess by drawing), both estimated from the draws that were made.
    """

    def __init__(self, option: object) -> None:
        self.option = check_compute(option)
        self.outliers: Tensor | None = None  # [], computed samples far above their bound so far
        self._notes: set[str] = set()
        self._share = FIRST
        self._calls = 0
        # excess variance of each share [shares, 2 (selector, classifier), 2 (over, under)]
        self._sums: Tensor | None = None
        self._host: Tensor | None = None  # a copy of the sums
        self._arrived: torch.cuda.Event | None = None

    def number(self, size: int) -> int | None:
        """k of the coming call with M candidates; None: the exact step."""
        option = self.option
        if option is None:
            return None
        if isinstance(option, int):
            return check_number_of_samples(OP, "compute", option, size)
        if isinstance(option, float):
            return max(1, round(option * size))
        share = EXPLORED if self._exploring() else self._share
        return None if share == 1.0 else max(min(LEAST, size), round(share * size))

    def observe(self, training: Sampled, learned: Sampled | None, p: Tensor) -> None:
        """Note a draw of the training batch, weighted p [M] in row 9, and that of the batch which
        the selector learned from."""
        note = training.note
        if note and note not in self._notes:
            self._notes.add(note)
            logger.info("%s: compute: no control variate, since %s", OP, note)
        weights = training.weights(p)
        bound = 1 / (0.3 * len(weights))
        limit = p[training.draw.indices].clamp(min=bound)
        far = (weights > FAR * limit).sum()
        self.outliers = far if self.outliers is None else self.outliers.to(far.device) + far
        looks = self._calls < FIRST_REVISION or self._calls % LOOKS_EVERY == 0
        looks = looks or self._exploring()
        if self.option == "auto" and looks and learned is not None and learned.noise is not None:
            sums = _excess(training, learned)
            self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def count(self, costs: Costs, ranks: Ranks) -> None:
        """One more call is complete; before a revision the sums set out for the host."""
        if self.option != "auto":
            return
        self._calls += 1
        if _is_revision(self._calls + AHEAD) and self._sums is not None:
            self._host = self._sums.to("cpu", non_blocking=True)
            if self._sums.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record()
            self._sums = None
        if _is_revision(self._calls + 1):
            self._decide(costs, ranks)

    def _exploring(self) -> bool:
        """Whether the call draws a part only to see what it would cost."""
        soon = range(self._calls + 2, self._calls + 2 + EXPLORING_CALLS)
        return self._share == 1.0 and any(map(_is_revision, soon))

    def _decide(self, costs: Costs, ranks: Ranks) -> None:
        """Take the share of the smallest price times variance; the largest that a rank would."""
        if self._host is None:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        top, bottom = self._host.double().unbind(-1)
        excess = (top / bottom.clamp(min=torch.finfo(torch.float64).tiny)).amax(1)
        excess = excess.nan_to_num(nan=torch.inf)
        excess[-1] = 0.0  # all are computed
        prices = [costs.of(s) * (1 + float(e)) for s, e in zip(SHARES, excess, strict=True)]
        best = prices.index(min(prices))
        chosen = ranks.union([i == best for i in range(len(SHARES))])
        self._share = max(s for s, flag in zip(SHARES, chosen, strict=True) if flag)
        self._host = self._arrived = None

    def state_dict(self) -> dict[str, Any]:
        """What "auto" has seen; tensors that are never written to."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return {
            "share": self._share,
            "calls": self._calls,
            "sums": self._sums,
            "host": self._host,
            "outliers": self.outliers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._share, self._calls = state.get("share", FIRST), state.get("calls", 0)
        self._sums, self._host = state.get("sums"), state.get("host")
        self.outliers = state.get("outliers")
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None


def check_compute(value: object) -> int | float | str | None:
    """None, a positive int, a share in (0, 1) or "auto"."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    hint = "pass a number of samples, a share of the batch such as 0.25, 'auto', or None for all"
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return check_int(OP, "compute", int(value), low=1, hint=hint)
    expected = "None, an int, a share between 0 and 1 or 'auto'"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not 0 < float(value) < 1:
            fail(ValueError, OP, "compute", expected, f"{float(value):g}", hint)
        return float(value)
    error = ValueError if isinstance(value, str) else TypeError
    got = repr(value) if error is ValueError else describe(value)
    fail(error, OP, "compute", expected, got, hint)


STATE_TYPES: dict[str, Any] = {
    "share": float,
    "calls": int,
    "sums": (torch.Tensor, type(None)),
    "host": (torch.Tensor, type(None)),
    "outliers": (torch.Tensor, type(None)),
}


def _is_revision(call: int) -> bool:
    """Whether "auto" decides anew in call number 8, 16, 32, ..."""
    return call >= FIRST_REVISION and call & (call - 1) == 0


def _excess(training: Sampled, learned: Sampled) -> Tensor:
    """Sums [shares, 2, 2] over the computed samples, of the selector's gradient and the
    classifier's: variance by drawing each share, and that of the exact step."""
    assert learned.noise is not None and learned.signal is not None
    rows = []
    for share in SHARES:
        selector = variance_ratio(
            learned.draw, _inclusion(learned, share), learned.noise, learned.signal
        )
        size = training.gradient_sizes
        excess = 1 / _inclusion(training, share) - 1
        classifier = (excess * size.square()).sum(), size.square().sum()
        rows.append(torch.stack([*map(torch.Tensor.double, (*selector, *classifier))]).view(2, 2))
    return torch.stack(rows)


def _inclusion(sampled: Sampled, share: float) -> Tensor:
    """pi [M] of a draw of another share of the same candidates."""
    count = len(sampled.sizes)
    return inclusion_probabilities(sampled.sizes, max(1, round(share * count)))
