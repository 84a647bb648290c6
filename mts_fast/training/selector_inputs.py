"""Builds the selector's input: online features, then the caller's.

`columns` are those of the samples at hand; `standardized` works on those of all ranks.

Online features need an eval-mode forward. Where the training forward gives the same penultimate
features (compared once per combination of module modes), it is used instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import RngState, World, preserved_buffers, preserved_rng, training_mode
from mts_fast.features import OnlineStandardizer, PenultimateFeatures, online_features
from mts_fast.hypergradient import LabelledBatch, Linearization, Objective
from mts_fast.training.batch import CheckedBatch


class OfflineForward:
    """The training forward of a batch whose selector input is the caller's features alone."""

    def __init__(self, batch: CheckedBatch) -> None:
        self._batch = batch

    def ran(self, linearization: Linearization) -> None:
        """Nothing is read of the forward."""

    def columns(self) -> Tensor:
        """[B, F]."""
        return _offline(self._batch)


class OfflineFeatures:
    """The caller's features alone."""

    watched: PenultimateFeatures | None = None  # the layer that features are read of

    def penultimate(self, batch: LabelledBatch) -> Tensor:
        """No layer is read."""
        raise AssertionError("nothing is watched")

    @contextmanager
    def beside_forward(self, batch: CheckedBatch) -> Iterator[OfflineForward]:
        """Inside, the training forward of the batch is run."""
        yield OfflineForward(batch)

    def columns(self, batch: CheckedBatch, penultimate: Tensor | None = None) -> Tensor:
        """[B, F]."""
        return _offline(batch)

    def standardized(self, columns: Tensor, *, update: bool) -> Tensor:
        """As they are."""
        return columns

    def tensors(self) -> list[Tensor]:
        """No state."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """No state."""


class OnlineForward:
    """The training forward of a batch, watched for its penultimate features."""

    def __init__(
        self, owner: OnlineFeatures, batch: CheckedBatch, precomputed: Tensor | None
    ) -> None:
        self._owner = owner
        self._batch = batch
        self._eval_features = precomputed  # [B, D]
        self._training_features: Tensor | None = None  # [B, D]
        self.watched: PenultimateFeatures | None = None

    def ran(self, linearization: Linearization) -> None:
        """Report the forward; a watched one is run here and gives its penultimate features."""
        if self.watched is not None:
            linearization.run()
            self._training_features = self.watched.taken(len(self._batch))

    def compare(self, state_unchanged: bool) -> bool:
        """Whether the training forward gave the features of eval mode, without changing state."""
        training, evaluation = self._training_features, self._eval_features
        assert training is not None
        same = state_unchanged and (evaluation is None or _equal(evaluation, training))
        if same:
            self._eval_features = training
        return same

    def columns(self) -> Tensor:
        """[B, k + 1 + F]."""
        return self._owner.columns(self._batch, self._eval_features)


class OnlineFeatures:
    """k + 1 cosines to the validation batch that was observed last, then the caller's features."""

    def __init__(
        self,
        objective: Objective,
        layer: str | None,
        k: int,
        momentum: float | None,
        micro_batch: int | None,
    ) -> None:
        self._objective = objective
        self.watched = PenultimateFeatures(objective.model, layer)
        self._k = k
        self.micro_batch = micro_batch
        self._standardizer = OnlineStandardizer(momentum)
        self.validation: Tensor | None = None  # [V, D], of the validation batch of all ranks
        self._precomputed: tuple[CheckedBatch, Tensor] | None = None  # a batch and its [B, D]
        # modes of all modules -> whether a training forward gives the features, too
        self._shared: dict[tuple[bool, ...], bool] = {}

    def of_validation(
        self, validation: LabelledBatch, selector_batch: CheckedBatch | None
    ) -> Tensor:
        """Features [V, D] of validation samples, with the current parameters and buffers.

        Those of the selector's batch are computed, too, unless its own forward will give them.
        """
        if validation.inputs is None:
            hint = "pass validation inputs, or make the step with online_features=False"
            fail(TypeError, "MTSStep", "val_inputs", "given for online features", "None", hint)
        features = validation.labels.new_empty(0, 0)  # of an empty shard
        if len(validation):
            parts = validation.split(self.micro_batch)
            features = self._in_eval_mode([part.inputs for part in parts])
        self._precomputed = None
        if selector_batch and not self._shared.get(self._objective.world.modes()):
            self._precomputed = selector_batch, self.penultimate(selector_batch)
        return features

    @contextmanager
    def beside_forward(self, batch: CheckedBatch) -> Iterator[OnlineForward]:
        """Inside, the training forward of the batch is run, and reported by `ran`."""
        modes = self._objective.world.modes()
        shared = self._shared.get(modes)
        precomputed = None
        if self._precomputed is not None and self._precomputed[0] is batch:
            precomputed = self._precomputed[1]
        elif not shared:
            precomputed = self.penultimate(batch)
        forward = OnlineForward(self, batch, precomputed)
        if shared is False:
            yield forward
            return
        before = _StateBefore(self._objective.world)
        with self.watched.capture() as forward.watched:
            yield forward
        self._shared[modes] = forward.compare(before.unchanged())

    def penultimate(self, batch: LabelledBatch) -> Tensor:
        """Penultimate features [B, D] in eval mode; of a batch that was observed, as of then."""
        if self._precomputed is not None and self._precomputed[0] is batch:
            return self._precomputed[1]
        return self._in_eval_mode([part.inputs for part in batch.split(self.micro_batch)])

    def _in_eval_mode(self, parts: list[Any]) -> Tensor:
        world = self._objective.world
        with (
            torch.no_grad(),
            training_mode(world, False),
            preserved_buffers(world),
            preserved_rng(world),
            self.watched.capture() as capture,
        ):
            for inputs in parts:
                self._objective.forward(inputs)
            return capture.taken()

    def columns(self, batch: CheckedBatch, penultimate: Tensor | None = None) -> Tensor:
        """[B, k + 1 + F]: cosines to the validation batch, then the caller's.

        penultimate: [B, D] in eval mode, where they are known.
        """
        assert self.validation is not None
        features = self.penultimate(batch) if penultimate is None else penultimate
        if len(features) != len(batch):
            hint = "name a layer whose input has the batch first, with feature_layer="
            expected = f"[{len(batch)}, D]"
            got = tuple(features.shape)
            fail(ValueError, "MTSStep", "penultimate features", expected, got, hint)
        available = len(self.validation)
        if self._k > available:
            hint = "use a larger validation batch or a smaller online_k"
            expected = f"at most the validation batch ({available})"
            fail(ValueError, "MTSStep", "online_k", expected, self._k, hint)
        # a sampled step may look at its candidates in 16 bit
        features = features.to(self.validation.dtype)
        nearest, centroid = online_features(features, self.validation, k=self._k)
        return torch.cat([nearest, centroid, _offline(batch).to(nearest.dtype)], dim=1)

    def standardized(self, columns: Tensor, *, update: bool) -> Tensor:
        """Columns [B, k + 1 + F] with standardised cosines; `update` moves running statistics."""
        nearest, centroid, offline = columns.tensor_split((self._k, self._k + 1), dim=1)
        parts = [
            self._standardizer("nearest", nearest, update=update),
            self._standardizer("centroid", centroid, update=update),
            offline,
        ]
        return torch.cat([p.to(columns.dtype) for p in parts], dim=1)

    def tensors(self) -> list[Tensor]:
        """Running statistics, in the memory that a call writes to."""
        return self._standardizer.tensors()

    def state_dict(self) -> dict[str, Any]:
        """Running statistics."""
        return self._standardizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over running statistics."""
        self._standardizer.load_state_dict(state)


class _StateBefore:
    """Generators and buffers before a forward, to tell whether it changed them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = RngState.capture(world)
        self._buffers = self._versions()

    def unchanged(self) -> bool:
        """Whether buffers and generators are as they were, as after a forward in eval mode."""
        return self._buffers == self._versions() and self._rng.equals(RngState.capture(self._world))

    def _versions(self) -> list[tuple[int, int]]:
        return [(id(buffer), buffer._version) for buffer in self._world.buffers()]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of fused layers."""
    return a.shape == b.shape and bool((a - b).norm() <= torch.finfo(a.dtype).eps ** 0.5 * a.norm())


def _offline(batch: CheckedBatch) -> Tensor:
    """The caller's features [B, F]; of width 0 where there are none."""
    if batch.features is not None:
        return batch.features
    return torch.zeros(len(batch), 0, device=batch.labels.device)
