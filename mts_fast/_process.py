"""Signals and output of a command: it ends in one line, even where nobody reads its output."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

INTERRUPTED = 130
# Ctrl-C, a batch system's request to end, and a terminal that is closed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts() -> Iterator[None]:
    """Inside, every request to stop raises KeyboardInterrupt."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def postponed() -> Iterator[list[int]]:
    """Inside, requests to stop are added to the list instead of raised."""
    requests: list[int] = []
    with _handled_by(lambda number, _: requests.append(number)):
        yield requests


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Inside, a request to stop ends the process: for calls that a Python handler has to wait for
    and in which nothing can be lost."""
    with _handled_by(signal.SIG_DFL):
        yield


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers,
) -> Iterator[None]:
    """Signals that were ignored (nohup, a shell's background jobs) stay so, and threads other than
    the main one cannot set handlers."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in handled:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in handled.items():
            signal.signal(number, old)


class TolerantStream:
    """A text stream whose write() never fails: characters that its encoding lacks are escaped, and
    text that the stream refuses is dropped. `error` says why."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, act: Callable[..., Any], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            act(*arguments)
        except OSError as error:
            self.error = error
            # flushing the rest of the buffer when Python ends would fail again
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextmanager
def tolerant_output() -> Iterator[TolerantStream | None]:
    """Inside, stdout (None where it is closed) and stderr are tolerant streams."""
    before = sys.stdout, sys.stderr
    out, err = (None if stream is None else TolerantStream(stream) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        for stream in (out, err):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
