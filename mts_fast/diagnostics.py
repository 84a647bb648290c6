"""Diagnostics of a run: how concentrated the weights are, and how noisy the selector's gradient.

Nothing here waits for a device: values stay tensors until they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from mts_fast._check import (
    check_device,
    check_finite,
    check_floating,
    check_length,
    check_module,
    check_not_empty,
    check_positive_int,
    check_tensor,
    describe,
    fail,
)
from mts_fast._isolation import preserved_rng


@dataclass(frozen=True)
class WeightStatistics:
    """Scalars [] about one batch of weights; `read()` brings them to the host."""

    mean_weight: Tensor  # S / B
    max_p: Tensor
    var_p: Tensor  # population variance
    effective_batch_size: Tensor  # 1 / sum p^2, between 1 and B
    # where the step updated the selector: entries of kappa that were rounding noise, set to 0
    masked_entries: Tensor | None = None
    # samples of the batch that a sampled step computed; see `SamplingStatistics`
    computed: Tensor | None = None

    def read(self) -> dict[str, float]:
        """Plain floats by name, without fields that are None; waits for the device once."""
        return _read(self)


@dataclass(frozen=True)
class SamplingStatistics:
    """Scalars [] about one draw of k of M candidates; `read()` brings them to the host."""

    computed: Tensor  # k
    effective_samples: Tensor  # (sum c p)^2 / sum (c p)^2 over the computed, between 1 and k
    largest_weight: Tensor  # max c p of row 9; at most max(p, 1 / (0.3 k)) while p' = p
    outliers: Tensor  # computed samples of more than twice that bound, in all calls so far
    # of the regression of the dots on their last layer's part; None where none were computed
    slope: Tensor | None = None
    correlation: Tensor | None = None
    # variance of the selector's gradient by drawing over that of a batch of M, about
    variance: Tensor | None = None

    def read(self) -> dict[str, float]:
        """Plain floats by name, without fields that are None; waits for the device once."""
        return _read(self)


def _read(statistics: WeightStatistics | SamplingStatistics) -> dict[str, float]:
    named = {f.name: getattr(statistics, f.name) for f in fields(statistics)}
    present = {name: value for name, value in named.items() if value is not None}
    values = torch.stack([value.double() for value in present.values()]).tolist()
    return dict(zip(present, values, strict=True))


def weight_statistics(weights: Tensor, p: Tensor) -> WeightStatistics:
    """Concentration of a batch's weights.

    Args:
        weights: w [B], raw weights.
        p: [B], normalised weights.

    Returns:
        WeightStatistics with mean w, max p, Var p and the effective batch size 1 / sum p^2.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, an empty batch.

    Source: the paper's Figure 2.

    Example:
        >>> import torch, mts_fast
        >>> w = torch.ones(4)
        >>> mts_fast.diagnostics.weight_statistics(w, w / 4).read()["effective_batch_size"]
        4.0
    """
    op = "weight_statistics"
    check_floating(op, "weights", weights, ndim=1)
    check_not_empty(op, "weights", weights)
    check_floating(op, "p", p, ndim=1)
    check_length(op, "p", p, len(weights))
    check_device(op, "p", p, weights.device, "weights")
    weights, p = weights.detach(), p.detach()
    return WeightStatistics(weights.mean(), p.max(), p.var(correction=0), 1 / p.square().sum())


class GSNRMeter:
    """Gradient signal-to-noise ratio from observed gradients: mean^2 / variance, per parameter.

    Each observation is one independent gradient estimate (one batch, or one micro-batch). The
    squared mean of n observations overstates the true one by variance / n, which is subtracted.

    Example:
        >>> import torch, mts_fast
        >>> meter = mts_fast.diagnostics.GSNRMeter()
        >>> for value in (1.0, 3.0):
        ...     meter.update([torch.tensor([value])])
        >>> round(meter.value().item(), 6)  # (2^2 - 2/2) / 2
        1.5
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: list[Tensor] = []
        self._squares: list[Tensor] = []  # sums of squared deviations (Welford)

    def update(self, gradient: Iterable[Tensor]) -> None:
        """Add one observation: a tensor per parameter, always of the same shapes.

        Raises:
            TypeError, ValueError: something else than floating-point tensors (None for a parameter
                without a gradient), other shapes or devices than before, on the CPU also NaN or
                infinity. Nothing is counted then.
        """
        observed = [g.detach().double() for g in self._checked(gradient)]
        if not self.count:
            self._mean = [torch.zeros_like(g) for g in observed]
            self._squares = [torch.zeros_like(g) for g in observed]
        self.count += 1
        for g, mean, squares in zip(observed, self._mean, self._squares, strict=True):
            deviation = g - mean
            mean += deviation / self.count
            squares += deviation * (g - mean)

    def _checked(self, gradient: Iterable[Tensor]) -> list[Tensor]:
        op, hint = "GSNRMeter.update", "pass [p.grad for p in model.parameters()]"
        if isinstance(gradient, Tensor) or not isinstance(gradient, Iterable):
            fail(TypeError, op, "gradient", "a list of tensors", describe(gradient), hint)
        gradient = list(gradient)
        if not gradient and not self.count:
            fail(ValueError, op, "gradient", "of at least one tensor", "none", hint)
        for index, g in enumerate(gradient):
            name = f"gradient[{index}]"
            if g is None:
                hint = "pass zeros for a parameter that has none"
                fail(TypeError, op, name, "a floating-point tensor", "None", hint)
            check_floating(op, name, g)
            if not g.is_cuda:  # on a GPU this check would wait for the device
                check_finite(op, name, g, "leave this observation out")
        if self.count:
            shapes = [tuple(m.shape) for m in self._mean]
            got = [tuple(g.shape) for g in gradient]
            if got != shapes:
                hint = "use one meter for one set of parameters"
                fail(ValueError, op, "gradient", f"of shapes {shapes}", got, hint)
            for index, (g, mean) in enumerate(zip(gradient, self._mean, strict=True)):
                check_device(op, f"gradient[{index}]", g, mean.device, "before")
        return gradient

    def value(self, *, pooled: int = 1) -> Tensor:
        """GSNR [] of one observation, or of the mean of `pooled` of them; NaN below two
        observations, and where no parameter varies."""
        check_positive_int("GSNRMeter.value", "pooled", pooled)
        if self.count < 2:
            return torch.tensor(float("nan"))
        mean = torch.cat([m.flatten() for m in self._mean])
        variance = torch.cat([s.flatten() for s in self._squares]) / (self.count - 1)
        return _gsnr(mean, variance, self.count, pooled)


def selector_gsnr(selector: nn.Module, inputs: Sequence[Tensor], cotangent: Tensor) -> Tensor:
    """GSNR [] of a batch's selector gradient, estimated within that one batch.

    The gradient is sum_i c_i with c_i = cotangent_i * dz_i/dphi. Taken as B independent draws, the
    c_i give its mean m B and its variance s^2 B per parameter, so GSNR = B (m^2 - s^2/B) / s^2.

    Args:
        selector: returns a logit per sample from `inputs`; its samples must be independent.
        inputs: the selector's arguments, each [B, ...].
        cotangent: dL_val/dz [B], from `selector_gradient`.

    Returns:
        the average over all parameters whose contributions vary; NaN of a single sample, and where
        none varies.

    Raises:
        TypeError, ValueError: no module, inputs or cotangent of other dtypes or lengths, a selector
            with batch statistics, which mix its samples.

    Notes:
        A selector with dropout draws one mask a sample; generators are left as they were.

    Source: the paper's GSNR; docs/algorithm.md, diagnostics.
    """
    op = "selector_gsnr"
    check_module(op, "selector", selector)
    check_floating(op, "cotangent", cotangent, ndim=1)
    if not isinstance(inputs, list | tuple):
        hint = "pass a tuple of the selector's arguments"
        fail(TypeError, op, "inputs", "a sequence of tensors", describe(inputs), hint)
    for index, value in enumerate(inputs):
        check_length(
            op, f"inputs[{index}]", check_tensor(op, f"inputs[{index}]", value), len(cotangent)
        )
    mixing = [n for n, m in selector.named_modules() if isinstance(m, _BatchNorm) and m.training]
    if mixing:
        hint = "use LayerNorm, or put them in eval mode"
        fail(ValueError, op, "selector", "without batch statistics", f"modules {mixing}", hint)
    trainable = {n: p.detach() for n, p in selector.named_parameters() if p.requires_grad}

    def contribution(parameters: dict[str, Tensor], c: Tensor, *row: Tensor) -> Tensor:
        z = functional_call(selector, parameters, tuple(r[None] for r in row))
        return (c * z).sum()

    in_dims = (None, *[0] * (1 + len(inputs)))
    each = vmap(grad(contribution), in_dims=in_dims, randomness="different")
    with preserved_rng(selector):
        rows = each(trainable, cotangent, *inputs)
    batch = len(cotangent)
    mean = torch.cat([r.detach().double().mean(0).flatten() for r in rows.values()])
    variance = torch.cat([r.detach().double().var(0).flatten() for r in rows.values()])
    return _gsnr(mean, variance, batch, batch)


def _gsnr(mean: Tensor, variance: Tensor, count: int, pooled: int) -> Tensor:
    """Average of pooled * (mean^2 - variance / count) / variance where variance > 0."""
    varies = variance > 0
    ratio = pooled * (mean.square() - variance / count) / variance.masked_fill(~varies, 1.0)
    return (ratio * varies).sum() / varies.sum()
