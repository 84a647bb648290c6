"""The samples of one role: names, classes, and what holds their content."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

Role = Literal["real", "synthetic", "val", "test"]
ROLES: tuple[Role, ...] = ("real", "synthetic", "val", "test")
TRAINING: tuple[Role, ...] = ("real", "synthetic")


class Picture(Protocol):
    """Where the bytes of an image file are: a path, or a row of a data set."""

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            OSError: it cannot be opened.
        """
        ...


@dataclass(frozen=True)
class Samples:
    """Samples of one folder, list or data set, in a fixed order.

    Attributes:
        role: what they are for.
        source: the folder or list, as the user wrote it.
        names: of the table of weights: paths below a folder, or as in a list; unique.
        labels: class names, in Unicode's composed form (NFC).
        contents: an image file each, or a text each.
        origins: the source of each sample; all are of `source` where it is empty.
        groups: a name each, where the list has a column of groups.
        empty_classes: folders of classes without a sample.
    """

    role: Role
    source: str
    names: tuple[str, ...]
    labels: tuple[str, ...]
    contents: tuple[Picture, ...] | tuple[str, ...]
    groups: tuple[str, ...] | None = None
    empty_classes: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def counts(self) -> Counter[str]:
        """Samples of each class."""
        return Counter(self.labels)

    def origin(self, index: int) -> str:
        """The source of a sample."""
        return self.origins[index] if self.origins else self.source

    def path(self, index: int) -> str:
        """The file that a sample is in: its image, or the list or data set that has it."""
        content = self.contents[index]
        if isinstance(content, Path):
            return str(content.absolute())
        origin = Path(self.origin(index)).expanduser()
        return str(origin.absolute()) if origin.exists() else self.origin(index)

    def only(self, indices: Sequence[int]) -> Samples:
        """The samples at `indices`."""
        return replace(
            self,
            names=tuple(self.names[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            contents=tuple(self.contents[i] for i in indices),  # type: ignore[arg-type]
            groups=None if self.groups is None else tuple(self.groups[i] for i in indices),
            origins=tuple(self.origins[i] for i in indices) if self.origins else (),
        )

    def without(self, indices: Sequence[int]) -> Samples:
        """All samples but those at `indices`."""
        gone = set(indices)
        return self.only([i for i in range(len(self)) if i not in gone])


def composed(name: str) -> str:
    """A name in Unicode's composed form: forms of one name are one name."""
    return unicodedata.normalize("NFC", name)
