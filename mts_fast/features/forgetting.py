"""Forgetting counts: how often a sample was classified rightly and then wrongly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mts_fast._check import (
    check_flags,
    check_integer,
    check_mapping,
    check_place,
    check_positive_int,
    check_range,
    check_readable,
    describe,
    fail,
)


class ForgettingCounter:
    """Counts, over epochs, how often a sample was classified rightly and then wrongly.

    Call `update` with any part of the pool whenever it is predicted; each sample is compared with
    its own last prediction.

    Example:
        >>> import torch, mts_fast
        >>> counter = mts_fast.features.ForgettingCounter(2)
        >>> for guess in ([1, 0], [0, 0], [1, 0]):
        ...     counter.update(torch.arange(2), torch.tensor(guess) == 1)
        >>> counter.counts.tolist(), counter.never_correct.tolist()
        ([1, 0], [False, True])
    """

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        check_positive_int("ForgettingCounter", "num_samples", num_samples)
        place = check_place("ForgettingCounter", "device", device)
        self.counts = torch.zeros(num_samples, dtype=torch.int64, device=place)
        self._last = torch.zeros(num_samples, dtype=torch.bool, device=place)
        self._ever = torch.zeros(num_samples, dtype=torch.bool, device=place)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Record predictions: indices [B] of the samples (each once), correct [B] bool or 0/1.

        Raises:
            TypeError, ValueError: wrong dtypes or shapes, probabilities or classes in place of
                flags, indices out of range or repeated (on a GPU not checked: it would wait).
        """
        self._count(*self._checked(indices, correct, distinct=True))

    def _checked(
        self, indices: Tensor, correct: Tensor, *, distinct: bool
    ) -> tuple[Tensor, Tensor]:
        """Predictions as int64 and bool, on the counts' device."""
        op = "ForgettingCounter.update"
        check_integer(op, "indices", indices, ndim=1)
        check_readable(op, "indices", indices)
        if isinstance(correct, Tensor) and correct.is_floating_point():
            hint = "compare predicted classes with the labels"
            fail(TypeError, op, "correct", "bool or 0/1 integers", describe(correct), hint)
        flags = check_flags(op, "correct", correct, len(indices))
        check_readable(op, "correct", correct)
        if correct.is_cuda and correct.dtype != torch.bool:  # else classes would count as flags
            check_range(op, "correct", correct, 0, 2, "compare classes with the labels")
        if not indices.is_cuda:
            hint = "they count the samples of the pool"
            check_range(op, "indices", indices, 0, len(self.counts), hint)
            if distinct and len(indices.unique()) != len(indices):
                hint = "update once per epoch"
                fail(ValueError, op, "indices", "distinct", "repeated ones", hint)
        return indices.long().to(self.counts.device), flags.to(self.counts.device)

    def _count(self, indices: Tensor, flags: Tensor) -> None:
        """Count predictions of distinct samples."""
        self.counts[indices] += self._last[indices] & ~flags
        self._last[indices] = flags
        self._ever[indices] |= flags

    @property
    def never_correct(self) -> Tensor:
        """[N] bool: samples that were wrong at every update (or never seen)."""
        return ~self._ever

    def columns(self) -> dict[str, Tensor]:
        """forgetting_counts and never_correct as float columns [N, 1] for a FeatureTable."""
        return {
            "forgetting_counts": self.counts[:, None].float(),
            "never_correct": self.never_correct[:, None].float(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Counts and last predictions."""
        return {name: value.clone() for name, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {"counts": self.counts, "last": self._last, "ever": self._ever}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over counts and last predictions of a counter of the same size, onto this device.

        Raises:
            TypeError, ValueError: not a state of a counter of the same size; nothing is changed.
        """
        op, hint = "ForgettingCounter.load_state_dict", "pass what state_dict() gave"
        check_mapping(op, "state", state, hint)
        for name, mine in self._state().items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.dtype != mine.dtype or value.ndim != 1:
                expected = f"a {mine.dtype} tensor of {len(mine)} samples"
                fail(TypeError, op, f"state[{name!r}]", expected, describe(value), hint)
            if len(value) != len(mine):
                expected = f"of {len(mine)} samples"
                fail(ValueError, op, f"state[{name!r}]", expected, len(value), hint)
            check_readable(op, f"state[{name!r}]", value)
        if (state["counts"] < 0).any():
            fail(ValueError, op, "state['counts']", "0 or more", "negative ones", hint)
        for name, mine in self._state().items():
            mine.copy_(state[name])
