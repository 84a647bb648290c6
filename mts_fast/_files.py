"""Files that are replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mts_fast._check import check_path, fail

# prefix of temporary folders, which are made beside the file that is written
PREFIX = ".mts_fast-"


@contextmanager
def writing(
    op: str, path: str | os.PathLike[str], errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Disk errors inside, of the given classes, become an OSError that names the file to be written
    and says whether an old one is unchanged."""
    try:
        yield
    except errors as error:
        left = "the old file is unchanged" if Path(path).exists() else "nothing was left there"
        hint = f"{left}: make room or permission, or name another path"
        fail(OSError, op, "path", "writable", f"{str(path)!r} ({error})", hint)


@contextmanager
def replaced_file(op: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` only when the block ends without error, with
    the permissions of the old file, or of any new one.

    Of a symbolic link the file that it points to is replaced, and the link stays.

    Raises:
        TypeError: no path.
        OSError: there is no such folder, it cannot be written to, or the path is of a folder, a
            device or a pipe; an old file is as it was.
    """
    target = regular_target(op, path)
    with writing(op, path):
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=PREFIX)
    # the lock shows that the writing process is still running
    with folder as name, locked(Path(name)):
        part = Path(name) / target.name
        yield part
        with writing(op, path):
            # some writers, as safetensors', make files that only their owner can read
            usual = target
            if not target.exists():
                usual = Path(name) / "usual"
                usual.touch()
            part.chmod(usual.stat().st_mode)
            os.replace(part, target)


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone has the folder inside the block. It does not where another one has
    it and `wait` is off, or where the system has no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield False
        return
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def regular_target(op: str, path: str | os.PathLike[str]) -> Path:
    """Where a file is to be written, links followed: an ordinary file, or nothing yet."""
    target = Path(os.path.realpath(check_path(op, "path", path)))
    if target.is_symlink() or (target.exists() and not target.is_file()):
        fail(OSError, op, "path", "of a file, or new", kind_of(path), "name a file")
    return target


def kind_of(path: str | os.PathLike[str]) -> str:
    """What lies at a path that is no ordinary file."""
    place = Path(path)
    if place.is_dir():
        return f"the folder {str(path)!r}"
    return f"{str(path)!r}, " + ("a device or a pipe" if place.exists() else "a link to itself")


def save_tensors(
    op: str, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors and metadata as safetensors, whole or not at all.

    Equal contents give equal bytes where the metadata have one key: safetensors writes several in
    any order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # a full disk shows as an error of the library
    with replaced_file(op, path) as part, writing(op, path, (OSError, SafetensorError)):
        save_file({n: v.contiguous() for n, v in tensors.items()}, part, metadata=metadata)
