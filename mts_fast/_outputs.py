"""Tries output folders before the work, and removes what killed processes left in them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mts_fast._check import fail
from mts_fast._files import PREFIX, locked

# age from which a temporary folder without a lock is a leftover: a new one is not locked at once
UNLOCKED_SECONDS = 60.0
HINT = "make room or permission, or name another place"


@contextmanager
def output_folder(op: str, arg: str, folder: Path) -> Iterator[None]:
    """Make a folder for the results of the block and try to write there; where the block fails,
    empty folders that were made for it are removed.

    Raises:
        OSError: it cannot be made or written to, or is no folder.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            hint = "name a folder"
            fail(OSError, op, arg, "a folder, or new", f"{str(folder)!r} ({error})", hint)
        except OSError as error:
            fail(OSError, op, arg, "writable", f"{str(folder)!r} ({error})", HINT)
        try_folder(op, arg, folder)
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def try_folder(op: str, arg: str, folder: Path) -> None:
    """Write a byte into a folder, in a file without a name.

    Raises:
        OSError: the folder takes no files.
    """
    _remove_leftovers(folder)
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=PREFIX) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        fail(OSError, op, arg, "in a writable folder", f"{str(folder)!r} ({error})", HINT)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders whose processes were killed: no one holds their locks."""
    with suppress(OSError):
        for path in folder.glob(f"{PREFIX}*"):
            if path.is_symlink() or not path.is_dir():
                continue
            if time.time() - path.stat().st_mtime < UNLOCKED_SECONDS:
                continue
            with locked(path, wait=False) as alone:
                if alone:
                    shutil.rmtree(path, ignore_errors=True)
