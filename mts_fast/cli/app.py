"""The command line: its verbs and what belongs to all of them. Nothing here imports torch."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mts_fast._version import __version__

# torch counts in int64
LARGEST = 2**63 - 1

VERBS: list[str] = []
app = typer.Typer(name="mts-fast", no_args_is_help=True, pretty_exceptions_enable=False)


class Interrupted(Exception):
    """Ctrl-C in a verb; Typer would take a KeyboardInterrupt for an exit without a message."""


def import_all(modules: Sequence[str]) -> None:
    """Import what a verb needs, so that a missing package is told before the work."""
    for module in modules:
        importlib.import_module(module)


def verb(run: Callable[..., int]) -> Callable[..., int]:
    """Registers a verb."""

    @functools.wraps(run)
    def interruptible(*args: Any, **kwargs: Any) -> int:
        try:
            return run(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted from None

    VERBS.append(run.__name__)
    app.command()(interruptible)
    return run


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mts-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say which engine and backend; tracebacks.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """Learn which training data to use (MTS), fast, on any torch model."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING)
