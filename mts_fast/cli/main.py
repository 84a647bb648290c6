"""Entry point of the command mts-fast. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

# the verbs register themselves, in the order of the help
import mts_fast.cli.verbs  # isort: skip
import mts_fast.cli.data_verbs  # noqa: F401  # isort: skip
from mts_fast._launcher import place
from mts_fast._process import (
    INTERRUPTED,
    TolerantStream,
    interrupts,
    postponed,
    tolerant_output,
)
from mts_fast.cli.app import VERBS, Interrupted, app
from mts_fast.cli.packages import hint_for
from mts_fast.cli.ranks import Voice, is_shared
from mts_fast.cli.usage import usage_message

# what a command line can meet; anything else is a fault of this package and shows its traceback
ERRORS = (OSError, ImportError, TypeError, ValueError, RuntimeError, MemoryError)
# how a failed allocation shows in torch, which has no class for it on the CPU
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
# what needs less memory, by verb
SMALLER = {
    "features": "pass a smaller --chunk, or ",
    "train": "pass --set micro_batch=N with fewer samples than a batch, or ",
}

logger = logging.getLogger("mts_fast")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in words if word in VERBS), "")
    name = f"mts-fast {verb}".strip()
    if verb and "--help" not in words:
        # outside of the handlers below: an exception in the middle of some imports would be lost
        importlib.import_module("mts_fast.training")
    voice = Voice(name, lambda error: _one_line(error, verb))
    with tolerant_output() as out, interrupts():
        try:
            shared = is_shared(verb, words)
            here = place(shared=shared)
            if here.ranks > 1 and shared:
                with voice.joined(here):
                    return _run(words, verb, out)
            return _run(words, verb, out) if here.rank == 0 else 0
        except (KeyboardInterrupt, Interrupted):
            voice.interrupted()
            return INTERRUPTED
        except TyperException as error:
            voice.say(usage_message(error, VERBS, name))
            return 2
        except ERRORS as error:
            with postponed():
                logger.info("where it was raised:", exc_info=error)
            voice.say(_one_line(error, verb), error)
            return 2


def _run(words: list[str], verb: str, out: TolerantStream | None) -> int:
    """Parse the command line and run its verb."""
    command = typer.main.get_command(app)
    status = command.main(args=words, prog_name="mts-fast", standalone_mode=False) or 0
    if out is not None:
        out.flush()
        # a reader that closes the pipe is no error, a full disk behind stdout is one
        if out.error is not None and not isinstance(out.error, BrokenPipeError):
            raise OSError(
                f"{verb}: standard output must be writable, got {out.error}; free the disk,"
                " or let it go elsewhere"
            )
    return int(status)


def _one_line(error: Exception, verb: str) -> str:
    """What went wrong, and what to do."""
    # each of several problems stands in a line of its own
    message = "\n- ".join(" ".join(line.split()) for line in str(error).split("\n- "))
    for known in (verb, "train", "launcher"):  # whose code other verbs run, too
        message = message.removeprefix(f"{known}: ")
    message = message.replace("use backend 'auto'", "set MTS_FAST_BACKEND to 'auto'")
    if isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY):
        if "; " in message:  # an error of this package, which says what to do
            return message
        hint = f"{SMALLER.get(verb, '')}close other programs"
        return f"memory must be enough, got {message or 'none left'}; {hint}"
    if isinstance(error, ImportError):
        hint = hint_for((error.name or "").partition(".")[0])
        if hint and "pip install" not in message:
            return f"{message}; {hint}"
    if isinstance(error, RuntimeError) and "; " not in message:
        return f"{message}; `mts-fast -v {verb}` shows where, `mts-fast doctor` what runs here"
    return message


if __name__ == "__main__":
    raise SystemExit(main())
