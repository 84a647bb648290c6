"""Notes on tensors that do not keep them alive."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Note = TypeVar("Note")


class WeakTable(Generic[Note]):
    """Tensor, by identity -> a note, as long as the tensor lives."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Note]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def get(self, t: Tensor) -> Note | None:
        """The note on a tensor, or None."""
        entry = self._entries.get(id(t))
        return None if entry is None or entry[0]() is not t else entry[1]

    def set(self, t: Tensor, note: Note) -> None:
        """Note something on a tensor, in place of what was noted before."""
        key, entries = id(t), self._entries

        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is reference:
                del entries[key]

        entries[key] = weakref.ref(t, forget), note
