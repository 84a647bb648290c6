"""The gap of the sum rule of one call, read without waiting in the next."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger("mts_fast")


class PendingGap:
    """Gap of the sum rule in a call that did not wait for it; the next call reads it."""

    def __init__(self, gap: Tensor, allowed: Tensor, engine: str) -> None:
        self._engine = engine
        self._event: torch.cuda.Event | None = None
        self._values = torch.stack([gap.detach(), allowed.detach().to(gap.dtype)])
        if gap.is_cuda:
            values = self._values
            self._values = torch.empty(2, dtype=gap.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def report(self) -> None:
        """Warn where the gap exceeds its bound; a gap that has not arrived yet is skipped."""
        if self._event is not None and not self._event.query():
            return
        gap, allowed = self._values.tolist()
        if gap > allowed:
            logger.warning(
                "%s: dots of engine %s in the last call missed sum p d = <kappa v, grad L> by %.1e"
                " of sum p |d| (allowed %.0e); see mts_fast.check_engine",
                "MTSStep",
                self._engine,
                gap,
                allowed,
            )
