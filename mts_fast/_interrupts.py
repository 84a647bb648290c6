"""Holds Ctrl-C back until a piece of work is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class HeldInterrupts:
    """Context manager: a SIGINT that comes inside is acted on when it is left.

    A second one acts at once. Only in the main thread, and only where a Python function handles
    SIGINT: elsewhere nothing is set.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._held = 0

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        # skip handlers that an exception at an odd moment left installed
        while isinstance(getattr(previous, "__self__", None), HeldInterrupts):
            previous = previous.__self__._previous  # type: ignore[union-attr]
        if callable(previous):
            self._previous = previous
            signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held += 1
        if self._held > 1:
            self._previous(number, frame)

    def __exit__(self, *_: object) -> None:
        if self._previous is None:
            return
        signal.signal(signal.SIGINT, self._previous)
        if self._held == 1:
            self._held = 0
            self._previous(signal.SIGINT, None)
