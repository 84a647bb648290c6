"""Online features with validation, and their standardisation by batch or by running statistics."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_device,
    check_floating,
    check_mapping,
    check_not_empty,
    check_positive_int,
    describe,
    fail,
)
from mts_fast.reference.online_features import VARIANCE_EPSILON

OP = "online_features"


def online_features(features: Tensor, val_features: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Cosines of samples to the validation batch, in the classifier's own feature space.

    Args:
        features: [B, D], penultimate activations of the samples; floating point.
        val_features: [V, D], those of the validation batch, V >= k.
        k: how many nearest validation samples.

    Returns:
        (nearest [B, k], descending; centroid [B, 1], cosine to the mean of val_features).

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, an empty batch, k > V.

    Notes:
        A zero vector has cosine 0 to everything.

    Source: docs/algorithm.md, features: online group.

    Example:
        >>> import torch, mts_fast
        >>> nearest, centroid = mts_fast.features.online_features(torch.eye(2), torch.eye(2), k=1)
        >>> nearest.flatten().tolist()
        [1.0, 1.0]
    """
    check_floating(OP, "features", features, ndim=2)
    check_floating(OP, "val_features", val_features, ndim=2)
    check_not_empty(OP, "features", features)
    check_not_empty(OP, "val_features", val_features)
    check_positive_int(OP, "k", k)
    if features.shape[1] != val_features.shape[1]:
        expected = f"[V, {features.shape[1]}] like features"
        hint = "take both from the same layer"
        fail(ValueError, OP, "val_features", expected, tuple(val_features.shape), hint)
    check_device(OP, "val_features", val_features, features.device, "features")
    if k > len(val_features):
        hint = "use a larger validation batch or a smaller k"
        fail(ValueError, OP, "k", f"at most the validation batch ({len(val_features)})", k, hint)
    return reference.online_features(features, val_features, k=k)


class OnlineStandardizer:
    """Standardises each online feature by one mean and one variance over all its entries.

    momentum None: those of the batch, as published. Otherwise a running mean and variance,
    new = momentum * old + (1 - momentum) * batch, starting from the first batch's.
    """

    def __init__(self, momentum: float | None = None) -> None:
        if momentum is not None:
            op, hint = "OnlineStandardizer", "None standardises by the batch alone"
            expected = "None or in [0, 1)"
            if isinstance(momentum, bool) or not isinstance(momentum, Real):
                fail(TypeError, op, "momentum", expected, describe(momentum), hint)
            if not 0 <= momentum < 1:
                fail(ValueError, op, "momentum", expected, momentum, hint)
        self.momentum = momentum
        self._running: dict[str, Tensor] = {}  # name -> (mean, variance) [2]

    def __call__(self, name: str, values: Tensor, *, update: bool = True) -> Tensor:
        """Standardised values of the same shape; `update` moves the running statistics."""
        if self.momentum is None:
            return reference.standardize(values)
        batch = torch.stack([values.mean(), values.var(correction=0)])
        running = self._running.get(name, batch)
        if update:
            if name in self._running:
                running = self.momentum * running + (1 - self.momentum) * batch
                # in the same memory, which a CUDA graph holds
                self._running[name].copy_(running)
            else:
                self._running[name] = running
        return (values - running[0]) / (running[1] + VARIANCE_EPSILON).sqrt()

    def tensors(self) -> list[Tensor]:
        """The running statistics, in the memory that a call writes to."""
        return list(self._running.values())

    def state_dict(self) -> dict[str, Any]:
        """The running statistics."""
        return {"running": {name: value.clone() for name, value in self._running.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over running statistics.

        Raises:
            TypeError, ValueError: something else than `state_dict` gives; nothing is changed.
        """
        op, hint = "OnlineStandardizer.load_state_dict", "pass what state_dict() gave"
        check_mapping(op, "state", state, hint)
        running = check_mapping(op, "state['running']", state.get("running"), hint)
        for name, value in running.items():
            check_floating(op, f"state['running'][{name!r}]", value, ndim=1)
            if len(value) != 2:
                expected = "a mean and a variance"
                fail(ValueError, op, f"state['running'][{name!r}]", expected, describe(value), hint)
        self._running = {name: value.clone() for name, value in running.items()}
