"""Names the first quantity of a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast._check import check_finite, fail
from mts_fast._multi_tensor import largest_entry
from mts_fast.hypergradient import Objective

OP = "MTSStep"


@dataclass(frozen=True)
class FiniteChecks:
    """Checks of rows 3 to 5 and 9, whose values they read."""

    objective: Objective
    parameters: Sequence[Tensor]

    def check_validation(
        self, loss: Tensor, gradient: Sequence[Tensor | None] | None, theta: Sequence[Tensor]
    ) -> None:
        """Raise for the first of the gradient, theta' and the validation loss that is not."""
        assert gradient is not None
        if math.isfinite(loss):
            return
        self.check_gradient(gradient)
        for i, tensor in enumerate(theta):
            hint = "look at the optimizer's learning rate, eps and state"
            check_finite(OP, f"the virtual parameter {self._name(i)}", tensor, hint)
        hint = "the validation batch, or the model in its mode for it, is broken"
        check_finite(OP, "the validation loss", loss, hint)

    def check_gradient(self, gradient: Sequence[Tensor | None]) -> None:
        """Raise for the first gradient that is not. Waits for the device."""
        present = [(i, g) for i, g in enumerate(gradient) if g is not None]
        if math.isfinite(largest_entry([g for _, g in present])):
            return
        for i, g in present:
            if not torch.isfinite(g).all():
                got = f"NaN or infinity in that of {self._name(i)}"
                hint = "losses are finite: look for a derivative that is not (a norm or root at 0)"
                expected = "finite"
                fail(ValueError, OP, "the gradient of the training batch", expected, got, hint)

    def _name(self, i: int) -> str:
        """The dotted path of a parameter."""
        sharding = self.objective.sharding
        of_model = self.parameters if sharding is None else sharding.originals(self.parameters)
        for root in self.objective.world.roots:
            for name, candidate in root.named_parameters():
                if candidate is of_model[i]:
                    return repr(name)
        return f"number {i} of the optimizer"
