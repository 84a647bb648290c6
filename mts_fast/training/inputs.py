"""What the selector reads of a batch: the caller's features, with online ones before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.features import OnlineStandardizer, PenultimateFeatures, online_features
from mts_fast.hypergradient import Objective
from mts_fast.training.batch import CheckedBatch

Features = tuple[Tensor, Tensor | None]


class OfflineFeatures:
    """Only what the caller passes."""

    def __call__(self, batch: CheckedBatch, meta: CheckedBatch | None, val_inputs: Any) -> Features:
        """Features [B, F] of the batch, and [B2, F] of the selector's batch where there is one."""
        return _offline(batch), None if meta is None else _offline(meta)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""


class OnlineFeatures:
    """k + 1 cosines to the validation batch, from forwards in eval mode, then the caller's."""

    def __init__(
        self, objective: Objective, layer: str | None, k: int, momentum: float | None
    ) -> None:
        self._objective = objective
        self._penultimate = PenultimateFeatures(objective.model, layer)
        self._k = k
        self._standardizer = OnlineStandardizer(momentum)

    def __call__(self, batch: CheckedBatch, meta: CheckedBatch | None, val_inputs: Any) -> Features:
        """Features [B, k + 1 + F] of the batch, and of the selector's batch where there is one.

        Running statistics move once per call, with the batch that the selector learns from.
        """
        model = self._objective.model
        with (
            torch.no_grad(),
            training_mode(model, False),
            preserved_buffers(model),
            preserved_rng(model),
            self._penultimate.capture() as capture,
        ):
            self._objective.forward(val_inputs)
            val_features = capture.taken()
            self._objective.forward(batch.inputs)
            own = self._beside_offline(batch, capture.taken(), val_features, update=meta is None)
            if meta is None:
                return own, None
            self._objective.forward(meta.inputs)
            return own, self._beside_offline(meta, capture.taken(), val_features, update=True)

    def _beside_offline(
        self, batch: CheckedBatch, features: Tensor, val_features: Tensor, *, update: bool
    ) -> Tensor:
        if len(features) != len(batch.labels):
            hint = "name a layer whose input has the batch first, with feature_layer="
            expected = f"[{len(batch.labels)}, D]"
            got = tuple(features.shape)
            fail(ValueError, "MTSStep", "penultimate features", expected, got, hint)
        nearest, centroid = online_features(features, val_features, k=self._k)
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


def _offline(batch: CheckedBatch) -> Tensor:
    """The caller's features [B, F]; of width 0 where there are none."""
    if batch.features is not None:
        return batch.features
    return torch.zeros(len(batch.labels), 0, device=batch.labels.device)
