"""How Triton kernels are launched: on a GPU, in the interpreter, or recorded without a run."""

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
    """A kernel with the arguments of one launch, from which it can be compiled without a GPU."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, num_warps, num_stages


_recorded: list[Launch] | None = None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """A block in which launches are appended to the list instead of being run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current device."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, options))
        return
    if not all(grid):
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options, **COMPILE_OPTIONS)
