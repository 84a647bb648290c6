"""Diagnostics of a run: how concentrated the weights are, and how noisy the selector's gradient.

Nothing here waits for a device: values stay tensors until they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mts_fast._check import check_floating, check_length, check_not_empty, fail


@dataclass(frozen=True)
class WeightStatistics:
    """Scalars [] about one batch of weights; `read()` brings them to the host."""

    mean_weight: Tensor  # S / B
    max_p: Tensor
    var_p: Tensor  # population variance
    effective_batch_size: Tensor  # 1 / sum p^2, between 1 and B
    # of a step in which the selector learned: entries of kappa that were rounding noise, set to 0
    masked_entries: Tensor | None = None

    def read(self) -> dict[str, float]:
        """Plain floats by name, without what is None; waits for the device once."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
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
    weights, p = weights.detach(), p.detach()
    return WeightStatistics(weights.mean(), p.max(), p.var(correction=0), 1 / p.square().sum())


class GSNRMeter:
    """Gradient signal-to-noise ratio from observed gradients: mean^2 / variance, per parameter.

    Each observation is one independent gradient estimate (one batch, or one micro-batch). The
    squared mean of n observations overstates the true one by variance / n, which is taken off.

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

    def update(self, gradient: Sequence[Tensor]) -> None:
        """Add one observation: a tensor per parameter, always of the same shapes."""
        observed = [g.detach().double() for g in gradient]
        if not self.count:
            self._mean = [torch.zeros_like(g) for g in observed]
            self._squares = [torch.zeros_like(g) for g in observed]
        if [g.shape for g in observed] != [m.shape for m in self._mean]:
            expected = f"of shapes {[tuple(m.shape) for m in self._mean]}"
            got = [tuple(g.shape) for g in observed]
            fail(ValueError, "GSNRMeter.update", "gradient", expected, got)
        self.count += 1
        for g, mean, squares in zip(observed, self._mean, self._squares, strict=True):
            deviation = g - mean
            mean += deviation / self.count
            squares += deviation * (g - mean)

    def value(self, *, pooled: int = 1) -> Tensor:
        """GSNR [] of one observation, or of the mean of `pooled` of them; NaN below two."""
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
        the average over all parameters whose contributions vary.

    Source: the paper's GSNR; DESIGN, diagnostics.
    """
    trainable = {n: p.detach() for n, p in selector.named_parameters() if p.requires_grad}

    def contribution(parameters: dict[str, Tensor], c: Tensor, *row: Tensor) -> Tensor:
        z = functional_call(selector, parameters, tuple(r[None] for r in row))
        return (c * z).sum()

    in_dims = (None, *[0] * (1 + len(inputs)))
    rows = vmap(grad(contribution), in_dims=in_dims)(trainable, cotangent, *inputs)
    batch = len(cotangent)
    mean = torch.cat([r.detach().double().mean(0).flatten() for r in rows.values()])
    variance = torch.cat([r.detach().double().var(0).flatten() for r in rows.values()])
    return _gsnr(mean, variance, batch, batch)


def _gsnr(mean: Tensor, variance: Tensor, count: int, pooled: int) -> Tensor:
    """Average of pooled * (mean^2 - variance / count) / variance where variance > 0."""
    varies = variance > 0
    ratio = pooled * (mean.square() - variance / count) / variance.masked_fill(~varies, 1.0)
    return (ratio * varies).sum() / varies.sum()
