"""Whether float32 products may round their operands to TF32: torch's switches, old and new."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_like_convolutions: ContextVar[bool] = ContextVar("mts_fast_like_convolutions", default=False)


@contextmanager
def like_convolutions() -> Iterator[None]:
    """Inside, products stand for convolutions, which have a switch of their own."""
    token = _like_convolutions.set(True)
    try:
        yield
    finally:
        _like_convolutions.reset(token)


def allows_tf32() -> bool:
    """Whether torch's own product, or convolution, would use TF32 on a GPU that has it.

    torch raises where its old switch is read after a new one was set, and reports both by the new.
    """
    if _like_convolutions.get():
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
