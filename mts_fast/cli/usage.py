"""Messages for a command line that cannot be parsed, in the format of all errors."""

from __future__ import annotations

import difflib
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


def decimal(text: str | float) -> float:
    """A number, with a message that says so; 50 % may be written as 50%."""
    try:
        if isinstance(text, str) and text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number, got {text!r}; pass one like 0.5") from None


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
        key = _key_of_train(option) if name == "mts-fast train" else None
        if key is not None:
            hint = f"pass --set {key}=VALUE, or {help_hint}"
        return f"options must be ones that the command has, got {option}; {hint}"
    if message.startswith("must be "):
        return f"{argument} {message}"
    extra = re.match(r"Got unexpected extra arguments? *(?:\(s\))? *\((.*)\)", message)
    if extra and name == "mts-fast train":
        expected = "options, each with its value"
        return f"{argument} must be {expected}, got {extra[1]!r}; write --set KEY=VALUE as one word"
    choice = re.search(r"'(.*)' is not one of (.*?)\.?$", message)
    if choice:
        return f"{argument} must be one of {choice[2]}, got {choice[1]!r}; {help_hint}"
    command = re.match(r"No such command ['\"](.*?)['\"]", message)
    if command:
        expected = ", ".join(sorted(verbs))
        meant = re.search(r"Did you mean ['\"](.*?)['\"]", message)
        hint = f"did you mean {meant[1]!r}? Or {help_hint}" if meant else help_hint
        return f"the command must be one of {expected}, got {command[1]!r}; {hint}"
    return f"{argument} must be as the help says, got: {message.rstrip('.')}; {help_hint}"


def _key_of_train(option: str) -> str | None:
    """The key of `mts-fast train` that is meant by an option that the command lacks."""
    try:
        from mts_fast.pipeline.config import Config
    except ImportError:  # the command needs packages, which it names itself
        return None
    near = difflib.get_close_matches(
        option.lstrip("-").replace("-", "_"), Config.model_fields, n=1, cutoff=0.8
    )
    return near[0] if near else None


def _argument(error: TyperException) -> str:
    """The option as it is typed, or the argument as the help names it."""
    parameter = getattr(error, "param", None)
    if parameter is None:
        return "the command line"
    if getattr(parameter, "param_type_name", "") == "option":
        return str(max(parameter.opts, key=len))
    return str(getattr(parameter, "metavar", None) or parameter.name).partition("[")[0]
