"""Lion (arXiv 2302.06675), which torch does not implement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mts_fast._check import check_number
from mts_fast.reference.update_rules.rule import (
    NOT_NEGATIVE,
    SHARE,
    Bounds,
    Options,
    UpdateRule,
    number,
)


class LionRule(UpdateRule):
    """Lion: theta' = (1 - lr weight_decay) theta - lr sign(c), c = beta1 exp_avg + (1 - beta1) g.

    Groups hold "lr", "betas", "weight_decay" and may hold "maximize"; the state holds "exp_avg".

    The derivative of a sign is 0 almost everywhere: kappa is 0, no sample's weight would change the
    validation loss to first order, and the selector would never learn. So `LionRule()` is refused
    by name. With `softness=s` kappa, and kappa alone, is that of the soft sign

        c / sqrt(c^2 + s^2 mean(c^2)), the mean held fixed,

    a surrogate: entries of |c| below s times the tensor's root mean square count. theta' stays
    Lion's own.

    Args:
        softness: s > 0, in root mean squares of c; None: theta' alone.

    Example:
        >>> import torch, mts_fast
        >>> class Lion(torch.optim.Optimizer): ...
        >>> mts_fast.register_update_rule(Lion, mts_fast.LionRule(softness=1.0))
    """

    numbers: ClassVar[Mapping[str, Bounds]] = {
        "lr": NOT_NEGATIVE,
        "betas": SHARE,
        "weight_decay": NOT_NEGATIVE,
    }

    def __init__(self, softness: float | None = None) -> None:
        if softness is not None:
            check_number("LionRule", "softness", softness, above=0.0)
        self.softness = softness

    def updated(
        self, parameter: Tensor, gradient: Tensor, group: Options, state: Options
    ) -> Tensor:
        lr = number(group["lr"])
        decayed = parameter * (1 - lr * number(group["weight_decay"]))
        return decayed - lr * _mean(gradient, group, state).sign()

    def direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Options,
        state: Options,
        along: Tensor,
    ) -> Tensor:
        if self.softness is None:
            return 0.0 * along
        c = _mean(gradient, group, state)
        width = self.softness**2 * (c * c).mean()
        slope = width / (c * c + width) ** 1.5
        sign = -1.0 if group.get("maximize") else 1.0
        factor = sign * number(group["lr"]) * (1 - number(group["betas"][0]))
        # where every c is 0, so is the width, and the slope would be 0 / 0
        return factor * torch.where(width > 0, slope, 0.0) * along

    def reasons(self, group: Options, state: Options) -> list[str]:
        if self.softness is None:
            return [
                "the derivative of Lion's sign is 0 almost everywhere, so that a selector would"
                " never learn (LionRule(softness=1.0) takes a soft sign for kappa)"
            ]
        return []

    def state_tensors(self, group: Options) -> tuple[str, ...]:
        return ("exp_avg",)


def _mean(gradient: Tensor, group: Options, state: Options) -> Tensor:
    """c, of which Lion takes the sign."""
    g = -gradient if group.get("maximize") else gradient
    beta1 = number(group["betas"][0])
    fresh = (1 - beta1) * g
    return fresh if not state else beta1 * state["exp_avg"] + fresh
