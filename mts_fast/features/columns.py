"""Columns of features by name, with notes on how they were computed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# of a column: what was done and what it measured, by name
Note = dict[str, str | int | float]


class Columns(dict[str, Tensor]):
    """Columns [N, width] by name; `notes` say of some how they were computed.

    A FeatureTable takes the notes over and saves them.
    """

    def __init__(self, columns: Mapping[str, Tensor], notes: Mapping[str, Note]) -> None:
        super().__init__(columns)
        self.notes = {name: dict(note) for name, note in notes.items()}
