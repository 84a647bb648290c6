"""Messages for a command line that cannot be parsed, in the format of all errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import typer
from typer.exceptions import TyperException


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high], with a message that says so."""

    def number(text: str | int) -> int:
        expected = f"must be a whole number from {low} to {high}, got {text!r}; pass one in digits"
        try:
            value = int(text)
        except ValueError:
            raise typer.BadParameter(expected) from None
        if not low <= value <= high:
            raise typer.BadParameter(expected)
        return value

    return number


def usage_message(error: TyperException, verbs: Iterable[str], name: str) -> str:
    """`<argument> must be <expected>, got <what came>; <what to do>`."""
    message = " ".join(getattr(error, "message", str(error)).split())
    help_hint = f"see `{name} --help`"
    kind = type(error).__name__
    argument = _argument(error)
    if kind == "MissingParameter":
        return f"{argument} must be given, got nothing; {help_hint}"
    if kind == "NoSuchOption":
        near = ", ".join(getattr(error, "possibilities", None) or [])
        hint = f"did you mean {near}? Or {help_hint}" if near else help_hint
        option = getattr(error, "option_name", "")
        return f"options must be ones that the command has, got {option}; {hint}"
    if message.startswith("must be "):
        return f"{argument} {message}"
    choice = re.search(r"'(.*)' is not one of (.*?)\.?$", message)
    if choice:
        return f"{argument} must be one of {choice[2]}, got {choice[1]!r}; {help_hint}"
    command = re.match(r"No such command '(.*)'", message)
    if command:
        expected = ", ".join(sorted(verbs))
        return f"the command must be one of {expected}, got {command[1]!r}; {help_hint}"
    return f"{argument} must be as the help says, got: {message.rstrip('.')}; {help_hint}"


def _argument(error: TyperException) -> str:
    """The option as it is typed, or the argument as the help names it."""
    parameter = getattr(error, "param", None)
    if parameter is None:
        return "the command line"
    if getattr(parameter, "param_type_name", "") == "option":
        return str(max(parameter.opts, key=len))
    return str(getattr(parameter, "metavar", None) or parameter.name).partition("[")[0]
