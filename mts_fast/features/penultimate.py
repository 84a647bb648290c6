"""Penultimate features: the input of a model's last linear layer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import check_module, describe, fail


class PenultimateFeatures:
    """Captures the input of one layer during a forward.

    The layer is the model's last nn.Linear in the order of registration, or `layer` (a dotted
    path). Inputs [B, ..., D] are averaged over the axes between, inputs [B, D, H, W] of a
    convolution over H and W.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | None = None,
        *,
        op: str = "MTSStep",
        argument: str = "feature_layer",
    ) -> None:
        self.op, self.argument = op, argument  # as errors name them
        self.path, self.layer = self._find(check_module(op, "model", model), layer)
        self._values: list[Tensor] = []

    @contextmanager
    def capture(self) -> Iterator[PenultimateFeatures]:
        """Inside, every forward adds its features [B, D] (detached)."""
        # a hook that an exception at an odd moment has left behind writes to another list
        values: list[Tensor] = []
        self._values = values
        keep = functools.partial(self._keep, values)
        handle = self.layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()
            self._values = []

    def taken(self, last: int | None = None) -> Tensor:
        """The features of all forwards, one after the other, or of the `last` samples."""
        if not self._values:
            hint = f"name a layer that is called, with {self.argument}="
            name = f"layer {self.path!r}"
            fail(RuntimeError, self.op, name, "called in the forward", "no call", hint)
        values = torch.cat(self._values) if len(self._values) > 1 else self._values[0]
        return values if last is None else values[-last:]

    def _keep(
        self,
        values: list[Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if values is not self._values:
            return
        x = next(iter([*args, *kwargs.values()]), None)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            name = f"the input of layer {self.path!r}"
            hint = f"name another layer with {self.argument}="
            fail(TypeError, self.op, name, "[B, ..., D] numbers", describe(x), hint)
        x = x.detach()
        if isinstance(module, nn.modules.conv._ConvNd):
            x = x.flatten(2).mean(2)
        elif x.ndim != 2:
            x = x.flatten(1, -2).mean(1)
        values.append(x)

    def _find(self, model: nn.Module, layer: str | None) -> tuple[str, nn.Module]:
        modules = dict(model.named_modules())
        if layer is not None:
            expected = f"a module path ({', '.join(list(modules)[1:8])}, ...)"
            hint = "model.named_modules() has them all"
            if not isinstance(layer, str):
                fail(TypeError, self.op, self.argument, expected, describe(layer), hint)
            if layer not in modules:
                fail(ValueError, self.op, self.argument, expected, repr(layer), hint)
            return layer, modules[layer]
        linear = [(path, m) for path, m in modules.items() if isinstance(m, nn.Linear)]
        if not linear:
            expected = "given for a model without nn.Linear"
            hint = "name the layer whose input holds the features, or do without them"
            fail(ValueError, self.op, self.argument, expected, None, hint)
        return linear[-1]
