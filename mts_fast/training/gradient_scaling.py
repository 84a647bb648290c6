"""Loss scaling for float16: every backward of a step at the scale of a torch GradScaler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast.hypergradient.precision import autocast_dtype
from mts_fast.ops.perturb import global_norm


def needs_scaler(parameters: Sequence[Tensor]) -> bool:
    """Whether the backwards run in float16, which rounds small gradients to 0."""
    return autocast_dtype(parameters) is torch.float16


def representable(
    direction: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Tensor | None]:
    """(direction / size, size); None for 1. Float16 has no numbers below 6e-8, as kappa v may be;
    of unit length its products with activations are no larger than these."""
    if not needs_scaler(parameters):
        return direction, None
    size = global_norm(direction)
    size = torch.where((size > 0) & size.isfinite(), size, 1.0)
    return [v / size.to(v.dtype) for v in direction], size


@dataclass
class GradientScaling:
    """One step's scale; without a scaler everything passes through unchanged.

    The cotangents of the backwards are multiplied by the scale, so that values that float16
    would round to zero survive; gradients are divided by it before they are used.
    """

    scaler: torch.amp.GradScaler | None = None
    _scale: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether there is a scale."""
        return self.scaler is not None and self.scaler.is_enabled()

    def scaled(self, cotangent: Tensor) -> Tensor:
        """A cotangent, or a loss, times the scale."""
        if not self.active:
            return cotangent
        return cotangent * self._factor(cotangent)

    def unscaled(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients over the scale."""
        if not self.active:
            return list(gradients)
        return [None if g is None else g / self._factor(g) for g in gradients]

    def scaled_again(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients times the scale, as the scaler expects them."""
        if not self.active:
            return list(gradients)
        return [None if g is None else g * self._factor(g) for g in gradients]

    def overflowed(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether scaling has pushed a gradient beyond its range. Waits for the device."""
        return self.active and not _finite([g for g in gradients if g is not None])

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        max_grad_norm: float | None,
        *,
        overflow: bool,
    ) -> bool:
        """Step the optimizer on the gradients that are set; returns whether it stepped."""
        if not self.active:
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            return True
        scaler = self.scaler
        assert scaler is not None
        if overflow:
            # the scaler reads .grad alone, but the validation gradient may have overflowed
            first = next(p for p in parameters if p.grad is not None)
            assert first.grad is not None
            first.grad = torch.full_like(first.grad, torch.inf)
        scaler.unscale_(optimizer)
        skips = not _finite([p.grad for p in parameters if p.grad is not None])
        if max_grad_norm is not None and not skips:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        return not skips

    def _factor(self, like: Tensor) -> Tensor:
        if self._scale is None:
            assert self.scaler is not None
            # the scaler's own tensor, read without waiting
            one = torch.ones((), device=like.device)
            self._scale = self.scaler.scale(one)
        return self._scale.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite: a sum with one in it is never finite."""
    return not gradients or bool(
        torch.isfinite(torch.stack([g.sum().float() for g in gradients])).all()
    )
