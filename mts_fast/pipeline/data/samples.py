"""The samples of one role: names, classes, and what holds their content."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["real", "synthetic", "val", "test"]
ROLES: tuple[Role, ...] = ("real", "synthetic", "val", "test")
TRAINING: tuple[Role, ...] = ("real", "synthetic")


@dataclass(frozen=True)
class Samples:
    """Samples of one folder, list or data set, in a fixed order.

    Attributes:
        role: what they are for.
        source: the folder or list, as the user wrote it.
        names: of the table of weights: paths below a folder, or as in a list; unique.
        labels: class names, in Unicode's composed form (NFC).
        contents: a file each, or a text each.
        groups: a name each, where the list has a column of groups.
        empty_classes: folders of classes without a sample.
    """

    role: Role
    source: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    contents: tuple[Path, ...] | tuple[str, ...]
    groups: tuple[str, ...] | None = None
    empty_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> Counter[str]:
        """Samples of each class."""
        return Counter(self.labels)

    def without(self, indices: Sequence[int]) -> Samples:
        """All samples but those at `indices`."""
        gone = set(indices)
        remaining = [i for i in range(len(self)) if i not in gone]
        return Samples(
            self.role,
            self.source,
            tuple(self.names[i] for i in remaining),
            tuple(self.labels[i] for i in remaining),
            tuple(self.contents[i] for i in remaining),  # type: ignore[arg-type]
            None if self.groups is None else tuple(self.groups[i] for i in remaining),
            self.empty_classes,
        )


def composed(name: str) -> str:
    """A name in Unicode's composed form: forms of one name are one name."""
    return unicodedata.normalize("NFC", name)
