"""torch's switches of a thread, which an exception inside torch's own clean-up would leave on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd import forward_ad
from torch.overrides import _len_torch_function_stack


@dataclass(frozen=True)
class Ambient:
    """Whether gradients are recorded, and how deep function modes and forward AD are nested."""

    grad_enabled: bool
    modes: int
    level: int

    @classmethod
    def capture(cls) -> Ambient:
        """As they are now."""
        return cls(torch.is_grad_enabled(), _len_torch_function_stack(), forward_ad._current_level)

    def restore(self) -> None:
        """Leave what was entered since. May be repeated."""
        while forward_ad._current_level > self.level:
            forward_ad.exit_dual_level()
        while _len_torch_function_stack() > self.modes:
            torch._C._pop_torch_function_stack()
        if torch.is_grad_enabled() != self.grad_enabled:
            torch._C._set_grad_enabled(self.grad_enabled)
