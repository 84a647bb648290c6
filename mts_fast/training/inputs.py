"""What the selector reads of a batch: the caller's features, with online ones before them.

Online features are taken in eval mode. Where the training forward computes the same, which is
looked at once for every setting of the modules' modes, it serves as that pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng, training_mode
from mts_fast.features import OnlineStandardizer, PenultimateFeatures, online_features
from mts_fast.hypergradient import LabelledBatch, Linearization, Objective
from mts_fast.training.batch import CheckedBatch

# runs the training forward of the batch in question
Linearize = Callable[[], Linearization]


class OfflineFeatures:
    """Only what the caller passes."""

    def look_at(self, val_inputs: Any, meta: CheckedBatch | None = None) -> None:
        """Nothing is read of the validation batch."""

    def with_forward(
        self, batch: CheckedBatch, linearize: Linearize, *, update: bool
    ) -> tuple[Tensor, Linearization]:
        """Features [B, F], and the training forward."""
        return _offline(batch), linearize()

    def alone(self, batch: CheckedBatch) -> Tensor:
        """Features [B, F]."""
        return _offline(batch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class OnlineFeatures:
    """k + 1 cosines to the validation batch that was looked at last, then the caller's."""

    def __init__(
        self,
        objective: Objective,
        layer: str | None,
        k: int,
        momentum: float | None,
        micro_batch: int | None,
    ) -> None:
        self._objective = objective
        self._penultimate = PenultimateFeatures(objective.model, layer)
        self._k = k
        self._micro_batch = micro_batch
        self._standardizer = OnlineStandardizer(momentum)
        self._val_features: Tensor | None = None  # [V, D]
        self._ahead: tuple[CheckedBatch, Tensor] | None = None  # a batch and its [B, D]
        # modes of all modules -> whether a training forward gives the features, too
        self._shared: dict[tuple[bool, ...], bool] = {}

    def look_at(self, val_inputs: Any, meta: CheckedBatch | None = None) -> None:
        """Take the features of the validation batch, under parameters and buffers as they are.

        Those of the selector's batch, too, unless its own forward will give them.
        """
        self._val_features = self._in_eval_mode([val_inputs])
        self._ahead = None
        if meta is not None and not self._shared.get(self._modes()):
            self._ahead = meta, self._of(meta)

    def with_forward(
        self, batch: CheckedBatch, linearize: Linearize, *, update: bool
    ) -> tuple[Tensor, Linearization]:
        """Features [B, k + 1 + F], and the training forward; `update` moves running statistics."""
        modes = self._modes()
        shared = self._shared.get(modes)
        features = None
        if self._ahead is not None and self._ahead[0] is batch:
            features = self._ahead[1]
        elif not shared:
            features = self._of(batch)
        if shared is False:
            line = linearize()
        else:
            with self._untouched() as untouched, self._penultimate.capture() as capture:
                line = linearize()
                _ = line.losses  # the forward, where it has not been run yet
                own = capture.taken(len(batch))
            same = untouched() and (features is None or _equal(features, own))
            self._shared[modes] = same
            features = own if same else self._of(batch) if features is None else features
        assert features is not None
        return self._beside_offline(batch, features, update=update), line

    def alone(self, batch: CheckedBatch) -> Tensor:
        """Features [B, k + 1 + F]; nothing moves."""
        return self._beside_offline(batch, self._of(batch), update=False)

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._objective.model.modules())

    def _of(self, batch: LabelledBatch) -> Tensor:
        """Penultimate features [B, D] in eval mode."""
        return self._in_eval_mode([part.inputs for part in batch.split(self._micro_batch)])

    def _in_eval_mode(self, parts: list[Any]) -> Tensor:
        model = self._objective.model
        with (
            torch.no_grad(),
            training_mode(model, False),
            preserved_buffers(model),
            preserved_rng(model),
            self._penultimate.capture() as capture,
        ):
            for inputs in parts:
                self._objective.forward(inputs)
            return capture.taken()

    @contextmanager
    def _untouched(self) -> Iterator[Callable[[], bool]]:
        """Asks whether what ran inside left buffers and generators alone, as in eval mode."""
        model = self._objective.model
        rng = RngState.capture(model.parameters())
        versions = [buffer._version for buffer in model.buffers()]
        yield (
            lambda: (
                rng.equals(RngState.capture(model.parameters()))
                and versions == [buffer._version for buffer in model.buffers()]
            )
        )

    def _beside_offline(self, batch: CheckedBatch, features: Tensor, *, update: bool) -> Tensor:
        assert self._val_features is not None
        if len(features) != len(batch):
            hint = "name a layer whose input has the batch first, with feature_layer="
            expected = f"[{len(batch)}, D]"
            got = tuple(features.shape)
            fail(ValueError, "MTSStep", "penultimate features", expected, got, hint)
        nearest, centroid = online_features(features, self._val_features, k=self._k)
        columns = [
            self._standardizer("nearest", nearest, update=update),
            self._standardizer("centroid", centroid, update=update),
            _offline(batch),
        ]
        return torch.cat([c.to(nearest.dtype) for c in columns], dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Running statistics."""
        return self._standardizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over running statistics."""
        self._standardizer.load_state_dict(state)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of fused layers."""
    return a.shape == b.shape and bool((a - b).norm() <= torch.finfo(a.dtype).eps ** 0.5 * a.norm())


def _offline(batch: CheckedBatch) -> Tensor:
    """The caller's features [B, F]; of width 0 where there are none."""
    if batch.features is not None:
        return batch.features
    return torch.zeros(len(batch), 0, device=batch.labels.device)
