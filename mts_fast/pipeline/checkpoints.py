"""Checkpoints of a training: a safetensors file each, whole or not there; the newest are kept."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mts_fast._files import replaced_file, writing
from mts_fast.pipeline.data.findings import Findings

NAME = "checkpoint-{:08d}.safetensors"
PATTERN = re.compile(r"checkpoint-(\d{8,})\.safetensors")
# keys of the file's metadata
STATE, CHECKSUM = "state", "checksum"
# marks a tensor in the JSON part, by its name in the file
TENSOR, TUPLE, PAIRS = "tensor!", "tuple!", "pairs!"


def save_checkpoint(folder: Path, step: int, state: Any, keep: int) -> Path:
    """Write a state; all checkpoints but the newest `keep` go.

    Raises:
        OSError: it cannot be written; older ones are as they were.
    """
    path = folder / NAME.format(step)
    save_state(path, state)
    for old in _checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def save_state(path: Path, state: Any) -> None:
    """Write a state of nested dicts, lists, tensors and numbers into a safetensors file.

    Raises:
        OSError: it cannot be written; an old file is as it was.
        TypeError: something else in it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(state, tensors, "t"))
    metadata = {STATE: text, CHECKSUM: checksum(text, tensors)}
    with replaced_file("train", path) as part, writing("train", path):
        save_file(tensors, part, metadata)


def load_newest(folder: Path, findings: Findings) -> tuple[int, Any] | None:
    """(step, state) of the newest whole checkpoint; broken ones are told in remarks, and older ones
    tried. None: there is none."""
    for path in _checkpoints(folder):
        try:
            return _step(path), load_state(path)
        except Exception as error:  # whatever a damaged file makes a reader raise
            first = (str(error) or type(error).__name__).splitlines()[0]
            findings.remark(f"checkpoint {path} is broken ({first}) and was not used")
    return None


def load_state(path: Path) -> Any:
    """The state in a file, on the CPU.

    Raises:
        ValueError: another content than was written.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        metadata = file.metadata() or {}
    text = metadata.get(STATE, "")
    if metadata.get(CHECKSUM) != checksum(text, tensors):
        raise ValueError("checkpoint must be as it was written, got another checksum; remove it")
    return _nested(json.loads(text), tensors)


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if PATTERN.fullmatch(path.name)]
    return sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    match = PATTERN.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Of the content, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {flat.dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """What JSON holds; tensors are put into `tensors`, each under its place."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().clone().contiguous()
        return {TENSOR: place}
    if isinstance(value, dict):
        pairs = [
            [_plain(k, tensors, f"{place}.{i}k"), _plain(v, tensors, f"{place}.{i}")]
            for i, (k, v) in enumerate(value.items())
        ]
        return {PAIRS: pairs}
    if isinstance(value, (list, tuple)):
        parts = [_plain(v, tensors, f"{place}.{i}") for i, v in enumerate(value)]
        return {TUPLE: parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"checkpoint: a state must be made of dicts, lists, tensors and numbers,"
        f" got {type(value).__name__}; convert it"
    )


def _nested(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_nested(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_nested(v, tensors) for v in value[TUPLE])
    return {_nested(k, tensors): _nested(v, tensors) for k, v in value[PAIRS]}
