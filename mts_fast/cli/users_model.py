"""A model, and perhaps a batch, from a function of the user's: PACKAGE.MODULE:FACTORY."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mts_fast._check import describe, fail


@contextmanager
def users_model(
    op: str, spec: str, *, with_batch: bool = False
) -> Iterator[tuple[nn.Module, list[Any]]]:
    """(model, [] or [inputs, labels]) for the block; errors of the user's code inside become one
    line with their file and line.

    Raises:
        ValueError: it does not name a function of a module.
        TypeError: the function returns something else.
        RuntimeError: the user's code raises.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name) or module_name.startswith("."):
        hint = "name an importable module and a function in it"
        fail(ValueError, op, "--model", "PACKAGE.MODULE:FACTORY", repr(spec), hint)
    with _current_folder_importable(), _users_code(op, spec):
        factory = getattr(importlib.import_module(module_name), name, None)
        if not callable(factory):
            expected = f"a function of {module_name}"
            hint = "name one that takes no arguments"
            fail(ValueError, op, "--model", expected, repr(name), hint)
        result = factory()
        model, *batch = result if isinstance(result, tuple | list) and result else (result,)
        lengths = (2,) if with_batch else (0, 2)
        if not isinstance(model, nn.Module) or len(batch) not in lengths:
            expected = "(module, inputs, labels)"
            expected = expected if with_batch else f"a module, or {expected}"
            got = describe(result)
            fail(TypeError, op, f"what {name}() returns", expected, got, "return one of them")
        yield model, batch


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _users_code(op: str, spec: str) -> Iterator[None]:
    """Turn any error of the user's module or model into one line with its file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if str(error).startswith(f"{op}: "):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        got = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        hint = f"mend it, or run `mts-fast -v {op}` for the traceback"
        if isinstance(error, ModuleNotFoundError):
            hint = "run this in the folder that holds it, or install it"
        raise RuntimeError(
            f"{op}: --model {spec} must be a model that runs, got {got}; {hint}"
        ) from error
