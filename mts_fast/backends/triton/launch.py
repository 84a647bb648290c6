"""How Triton kernels are launched: on a GPU, in the interpreter, or recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# passed explicitly: triton 3.10 changes its default
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """What one launch was asked to do, for those who compile it without a GPU."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages


_recorded: list[Launch] | None = None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are not run but written down, with their arguments."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor, whichever device is the current one."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, options))
        return
    if not all(grid):
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options, **COMPILE_OPTIONS)
