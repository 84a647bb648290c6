"""Penultimate features: what goes into a model's last linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mts_fast._check import fail


class PenultimateFeatures:
    """Captures the input of one layer during a forward.

    The layer is the model's last nn.Linear in the order of registration, or `layer` (a dotted
    path). Inputs [B, ..., D] are averaged over the axes between, inputs [B, D, H, W] of a
    convolution over H and W.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.path, self.layer = _find(model, layer)
        self.value: Tensor | None = None

    @contextmanager
    def capture(self) -> Iterator[PenultimateFeatures]:
        """Inside, every forward leaves its features [B, D] (detached) in `value`."""
        handle = self.layer.register_forward_pre_hook(self._keep)
        try:
            yield self
        finally:
            handle.remove()
            self.value = None

    def taken(self) -> Tensor:
        """The features of the last forward."""
        if self.value is None:
            hint = "name a layer that is called, with feature_layer="
            fail(
                RuntimeError,
                "MTSStep",
                f"layer {self.path!r}",
                "called in the forward",
                "no call",
                hint,
            )
        return self.value

    def _keep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        if isinstance(module, nn.modules.conv._ConvNd):
            self.value = x.flatten(2).mean(2)
        else:
            self.value = x if x.ndim == 2 else x.flatten(1, -2).mean(1)


def _find(model: nn.Module, layer: str | None) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if layer is not None:
        if layer not in modules:
            known = ", ".join(list(modules)[1:8])
            fail(
                ValueError, "MTSStep", "feature_layer", f"a module path ({known}, ...)", repr(layer)
            )
        return layer, modules[layer]
    linear = [(path, m) for path, m in modules.items() if isinstance(m, nn.Linear)]
    if not linear:
        hint = "name the layer whose input holds the features, or set online_features=False"
        fail(
            ValueError,
            "MTSStep",
            "feature_layer",
            "given for a model without nn.Linear",
            None,
            hint,
        )
    return linear[-1]
