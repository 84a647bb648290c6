"""Every option of a run: a recipe, a TOML file, KEY=VALUE, then the command line's own options."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import pydantic
from pydantic import Field

from mts_fast._check import fail
from mts_fast.pipeline.data.findings import counted

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Config(pydantic.BaseModel):
    """The options of `mts-fast train`. Names and values are those of the TOML file."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=False)

    # the data
    real: str
    synthetic: tuple[str, ...]
    val: str | None = None
    test: str | None = None
    val_share: Annotated[
        Share, Field(description="of the real samples, where val is not given")
    ] = 0.1
    text_column: str | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    # the classifier
    model: str
    pretrained: str | None = None
    image_size: Annotated[Positive | None, Field(description="none: of the data, up to 224")] = None
    max_tokens: Positive = 128
    # all trainings
    seed: Count = 0
    device: str = "auto"
    workers: Count = 0
    epochs: Positive = 30
    batch_size: Positive = 32
    micro_batch: Annotated[
        Positive | None, Field(description="samples at a time, for less memory; none: all")
    ] = None
    lr: Rate = 0.02
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: Count = 0
    decay_epochs: tuple[Positive, ...] = ()
    class_weights: Literal["none", "inverse_frequency"] = "none"
    crop: Annotated[float, Field(gt=0, le=1, description="least area of a random crop")] = 1.0
    jitter: Annotated[float, Field(ge=0, le=1, description="of brightness, contrast, colour")] = 0.0
    flip: bool = False
    # the selector
    selector_lr: Rate = 4e-3
    selector_weight_decay: NotNegative = 1e-4
    selector_every: Positive = 1
    selector_warmup_epochs: Count = 0
    val_batch_size: Positive = 128
    hypergradient_lr: Annotated[Rate | None, Field(description="none: the optimizer's")] = None
    engine: str = "auto"
    compute: Annotated[
        Share | Literal["auto"] | None,
        Field(description="share of a batch that a step computes; none: all"),
    ] = None
    dynamics_epochs: Positive = 10
    dynamics_batch_size: Positive = 128
    # retraining with the weights
    clean: Annotated[
        Literal["real+val", "val"],
        Field(description="what to trust: val alone where the real samples have a bias"),
    ] = "real+val"
    clean_share: Share = 0.5
    easy_power: Annotated[
        NotNegative, Field(description="above 0 where the data may hold a spurious correlation")
    ] = 0.0
    refinements: Count = 2
    # files and loggers
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    keep_checkpoints: Positive = 2
    checkpoint_every: Annotated[Positive, Field(description="epochs")] = 1


def load_config(
    file: str | None,
    options: Mapping[str, Any],
    assignments: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration of a run; every mistake in it is told at once.

    Args:
        file: a TOML file, the config.json of a run, or none.
        options: of the command line; None: not given.
        assignments: KEY=VALUE each, VALUE as in TOML; a bare word is a string.
        defaults: options that all others win over, such as a recipe's.

    Raises:
        ValueError: unknown keys (with the nearest one), wrong types or values, no such file
            format.
        FileNotFoundError: no such file.
    """
    values: dict[str, Any] = {**(defaults or {}), **({} if file is None else _read_file(file))}
    mistakes: list[str] = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            mistakes.append(f"--set {assignment!r} lacks '='; write KEY=VALUE")
        else:
            values[key.strip()] = _value(text.strip())
    values |= {key: value for key, value in options.items() if value is not None}
    for key in [key for key in values if key not in Config.model_fields]:
        nearest = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0)[0]
        mistakes.append(f"{key!r} is no option; the nearest is {nearest!r}")
        del values[key]
    try:
        config = Config(**values)
    except pydantic.ValidationError as error:
        mistakes += [_told(one, values) for one in error.errors()]
        _refuse(mistakes)
    if mistakes:
        _refuse(mistakes)
    return config


def _read_file(file: str) -> dict[str, Any]:
    """Options of a TOML file, or of the config.json of a run."""
    expected = "a TOML file, or the config.json of a run"
    hint = "one KEY = VALUE a line, strings in quotes"
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        values = json.loads(text) if file.lower().endswith(".json") else tomllib.loads(text)
    except FileNotFoundError:
        got = f"no file {file!r}"
        fail(FileNotFoundError, "train", "--config", expected, got, "check the path")
    except (OSError, ValueError) as error:
        fail(ValueError, "train", "--config", expected, f"{file!r} ({error})", hint)
    if not isinstance(values, dict):
        got = f"{file!r} with a {type(values).__name__}"
        fail(ValueError, "train", "--config", expected, got, hint)
    return values


def _value(text: str) -> Any:
    """A value as TOML has it; what is none, a bare word, is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _told(error: Any, values: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key!r} is not given; pass --{key}, or write it into the file"
    return f"{key!r}: {error['msg'].lower()}, got {values.get(str(error['loc'][0]))!r}"


def _refuse(mistakes: Sequence[str]) -> NoReturn:
    got = "\n".join(
        [f"{counted(len(mistakes), 'mistake')}:", *(f"- {mistake}" for mistake in mistakes)]
    )
    hint = "nothing was trained; `mts-fast train --help` lists the options"
    fail(ValueError, "train", "options", "known and of their types", got, hint)
