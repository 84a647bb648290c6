"""The console script mts-fast: handles signals before torch is imported, which takes seconds."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> int:
    """Run the command line; returns the exit status."""
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # ignored signals (nohup, a shell's background jobs) stay ignored
    handled = [name for name in names if signal.getsignal(name) is not signal.SIG_IGN]
    for name in handled:
        signal.signal(name, _leave)
    from mts_fast.cli.main import main as run

    status = run()
    # everything is written: signals are ignored while Python shuts down
    for name in handled:
        signal.signal(name, signal.SIG_IGN)
    return status


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End at once: an exception would be lost, or become another one, inside some imports."""
    if os.environ.get("RANK", "0") == "0":  # of several ranks one speaks
        os.write(2, b"mts-fast: interrupted while it started; nothing was changed\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    raise SystemExit(main())
