"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


@contextmanager
def writing(op: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the disk inside name the file that was to be written, and what became of it."""
    try:
        yield
    except OSError as error:
        kept = "the old file is unchanged" if Path(path).exists() else "nothing was left there"
        message = f"{op}: path must be writable, got {str(path)!r} ({error}); {kept}"
        raise OSError(message) from error


@contextmanager
def replaced_file(op: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` only when the block ends without error, with
    the permissions of the old file, or of any new one.

    Raises:
        OSError: there is no such folder, or it cannot be written to; an old file is as it was.
    """
    target = Path(path)
    with writing(op, target):
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".mts_fast-")
    with folder as name:
        part = Path(name) / target.name
        yield part
        with writing(op, target):
            # some writers, as safetensors', make files that only their owner can read
            usual = target
            if not target.exists():
                usual = Path(name) / "usual"
                usual.touch()
            part.chmod(usual.stat().st_mode)
            os.replace(part, target)


def save_tensors(
    op: str, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors and metadata as safetensors, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced_file(op, path) as part, writing(op, path):
        try:
            save_file({n: v.contiguous() for n, v in tensors.items()}, part, metadata=metadata)
        except SafetensorError as error:  # how a full disk shows there
            raise OSError(str(error)) from error
