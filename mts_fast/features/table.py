"""FeatureTable: named feature columns of a pool, standardised, on disk as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mts_fast._check import check_finite, check_floating, check_length, fail
from mts_fast._files import save_tensors
from mts_fast.reference.online_features import VARIANCE_EPSILON

OP = "FeatureTable"
# the paper's offline set of width 13, in the order of its selector's input.
PAPER_COLUMNS = (
    "real_centroid_cosine",
    "synthetic_centroid_cosine",
    "real_nearest3_cosine",
    "synthetic_nearest3_cosine",
    "knn5_weighted_label_agreement",
    "distance_to_median_percentile",
    "gradient_norm",
    "error_norm",
    "forgetting_counts",
)
FORMAT = "mts_fast.FeatureTable/1"


class FeatureTable(Mapping[str, Tensor]):
    """Columns [N, width] by name, over one pool of N samples.

    Each column is standardised per entry of its width, by the mean and population deviation over
    the pool at the time it was added. Constant entries become 0.

    Example:
        >>> import torch, mts_fast
        >>> table = mts_fast.features.FeatureTable({"loss": torch.tensor([[1.0], [3.0]])})
        >>> table.standardized().flatten().tolist()
        [-1.0, 1.0]
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None) -> None:
        self._columns: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}  # [2, width]: mean, standard deviation
        self.update(columns or {})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._columns:
            fail(KeyError, OP, "column", f"one of {list(self._columns)}", repr(name))
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def num_samples(self) -> int:
        """N, or 0 for an empty table."""
        return len(next(iter(self._columns.values()))) if self._columns else 0

    def update(self, columns: Mapping[str, Tensor]) -> None:
        """Add or replace columns, [N] or [N, width], all or none of them.

        Raises:
            TypeError, ValueError: not floating point, another N than the table's, NaN (with rows).
        """
        checked: dict[str, Tensor] = {}
        for name, value in columns.items():
            check_floating(OP, f"column {name!r}", value)
            value = value[:, None] if value.ndim == 1 else value
            if value.ndim != 2 or value.shape[0] == 0:
                fail(ValueError, OP, f"column {name!r}", "[N] or [N, width]", tuple(value.shape))
            first = next(iter([*self._columns.values(), *checked.values()]), value)
            check_length(OP, f"column {name!r}", value, len(first))
            check_finite(OP, f"column {name!r}", value)
            checked[name] = value.detach().clone()
        for name, value in checked.items():
            self._columns[name] = value
            deviation, mean = torch.std_mean(value, dim=0, correction=0)
            self._moments[name] = torch.stack([mean, deviation])

    def missing(self, names: Sequence[str] = PAPER_COLUMNS) -> list[str]:
        """Which of these columns are still to be computed: how a table is resumed."""
        return [name for name in names if name not in self._columns]

    def raw(self, names: Sequence[str] | None = None) -> Tensor:
        """Columns side by side [N, F], in the order of `names` (default: all, in order)."""
        return torch.cat([self[name] for name in self._order(names)], dim=1)

    def standardized(self, names: Sequence[str] | None = None) -> Tensor:
        """Columns side by side [N, F], each entry with mean 0 and deviation 1 over the pool."""
        parts = []
        for name in self._order(names):
            column, (mean, deviation) = self[name], self._moments[name]
            # a constant entry carries no information, and its rounding noise must not be blown up.
            scale = deviation.clamp(min=VARIANCE_EPSILON**0.5)
            parts.append((column - mean) / scale)
        return torch.cat(parts, dim=1)

    def _order(self, names: Sequence[str] | None) -> Sequence[str]:
        names = list(self._columns) if names is None else names
        if not names:
            fail(ValueError, OP, "names", "at least one column", "none")
        return names

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file; it replaces an old one only once it is complete.

        Raises:
            OSError: it cannot be written (a full disk, no such folder); an old one is unchanged.
        """
        tensors = {f"column/{n}": v for n, v in self._columns.items()}
        tensors |= {f"moments/{n}": v for n, v in self._moments.items()}
        metadata = {"format": FORMAT, "order": json.dumps(list(self._columns))}
        save_tensors(OP, path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureTable:
        """Read a table back.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a truncated file, or one that is not a FeatureTable.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).exists():
            raise FileNotFoundError(f"{OP}: path must be an existing file, got {str(path)!r}")
        table = cls()
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    fail(ValueError, OP, f"file {str(path)!r}", f"of format {FORMAT}", metadata)
                for name in json.loads(metadata["order"]):
                    table._columns[name] = file.get_tensor(f"column/{name}")
                    table._moments[name] = file.get_tensor(f"moments/{name}")
        except SafetensorError as error:
            fail(ValueError, OP, f"file {str(path)!r}", "a complete safetensors file", error)
        return table
