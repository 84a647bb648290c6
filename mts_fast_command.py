"""The console script mts-fast: answers signals before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit status."""
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # what is ignored (nohup, a shell's background jobs) stays ignored
    answered = [name for name in names if signal.getsignal(name) is not signal.SIG_IGN]
    for name in answered:
        signal.signal(name, _leave)
    from mts_fast.cli.main import main as run

    status = run()
    # everything is written: a signal while Python takes itself apart changes nothing more
    for name in answered:
        signal.signal(name, signal.SIG_IGN)
    return status


def _leave(_number: int, _frame: FrameType | None) -> None:
    """An exception would be lost, or become another one, in the middle of some imports."""
    os.write(2, b"mts-fast: interrupted while it started; nothing was changed\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
