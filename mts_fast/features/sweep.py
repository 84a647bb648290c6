"""DistributionSweep: the distribution features of a pool, chunk by chunk, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast._check import (
    check_choice,
    check_finite,
    check_floating,
    check_pool,
    check_positive_int,
    fail,
)
from mts_fast.ops.class_centroids import ClassCentroids, class_centroids_
from mts_fast.ops.label_agreement import label_agreement
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_
from mts_fast.ops.percentile_rank import percentile_rank
from mts_fast.reference.distribution_features import centroid_distances, feature_columns
from mts_fast.reference.percentile_rank import class_median

OP = "distribution_features"
BAD_ROWS = "drop or repair these rows"
# rows in memory at once, twice: 8192 x 1024 float32 are 32 MB; packing them for the kernel costs
# 1 % of comparing them.
CHUNK = 8192
# what a chunk may be compared in; half precision is converted.
COMPUTED = (torch.float32, torch.float64)


class EmbeddingSource(Protocol):
    """Embeddings [N, D] that are read a slice of rows at a time: a tensor, or a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class DistributionSweep:
    """Computes the distribution features of a pool that need not fit in memory, resumably.

    The work is a list of units: every chunk is read once for the class centroids, once with every
    later chunk for the neighbours, and once for the distances. Memory is O(chunk * D + N).

    Args:
        source: [N, D] floating point; a tensor, or anything with a shape and slices of rows.
        labels, is_synthetic, k, neighbors, small_class: as in `distribution_features`.
        chunk: rows in memory at once.

    Example:
        >>> import torch, mts_fast
        >>> x, y = torch.randn(40, 8), torch.arange(40) % 2
        >>> sweep = mts_fast.features.DistributionSweep(x, y, y.flip(0), small_class="pad")
        >>> for done in sweep.run():
        ...     pass
        >>> sweep.columns()["real_nearest3_cosine"].shape
        torch.Size([40, 3])
    """

    def __init__(
        self,
        source: EmbeddingSource | Tensor,
        labels: Tensor,
        is_synthetic: Tensor,
        *,
        k: int = 3,
        neighbors: int = 5,
        small_class: str = "error",
        chunk: int = CHUNK,
    ) -> None:
        if len(source.shape) != 2:
            fail(ValueError, OP, "embeddings", "2-dimensional", f"shape {tuple(source.shape)}")
        size, dimension = source.shape
        for name, value in (("k", k), ("neighbors", neighbors), ("chunk", chunk)):
            check_positive_int(OP, name, value)
        check_choice(OP, "small_class", small_class, ("error", "pad"))
        if neighbors >= size:
            fail(ValueError, OP, "neighbors", f"below the pool size {size}", neighbors)
        self.source = source
        self.labels, self.is_synthetic = check_pool(OP, labels, is_synthetic, size)
        names, self.labels = self.labels.unique(return_inverse=True)  # tables by name may be large
        if small_class == "error":
            _check_class_sizes(self.labels, self.is_synthetic, names, k)
        self.starts = range(0, size, chunk)
        self.chunk = chunk
        self.done = 0
        self._whole = True  # no unit was cut short
        like = self._read(0)[:0]
        self._lists = NeighborLists.empty(size, k=k, neighbors=neighbors, like=like)
        self._centroids = ClassCentroids.empty(len(names), dimension, like.device)
        self._cosines = like.new_zeros(size, 3)
        self._distance = like.new_zeros(size)

    @property
    def total(self) -> int:
        """Units of work: T^2 / 2 pairs of T chunks, and each chunk twice more."""
        count = len(self.starts)
        return count * (count + 1) // 2 + 2 * count

    def run(self) -> Iterator[int]:
        """Do what is left, unit by unit; yields how many are done."""
        count = len(self.starts)
        pairs = ((a, b) for a in range(count) for b in range(a, count))
        units: list[Callable[[], None]] = [
            *(partial(self._add_to_centroids, a) for a in range(count)),
            *(partial(self._compare, a, b) for a, b in pairs),
            *(partial(self._measure_distances, a) for a in range(count)),
        ]
        self._held: dict[int, NeighborChunk] = {}
        for unit in units[self.done :]:
            self._whole = False
            unit()
            self.done += 1
            self._whole = True
            yield self.done
        self._held.clear()

    def columns(self) -> dict[str, Tensor]:
        """The features by name, each [N, width], once all units are done.

        Raises:
            RuntimeError: units are left.
        """
        if self.done < self.total:
            message = f"{OP}: run() must be exhausted first, got {self.done} of {self.total} units"
            raise RuntimeError(message)
        found = self._lists.statistics()
        agreement = label_agreement(found.similarity, found.index, self.labels)
        gap = (self._distance - class_median(self._distance, self.labels)).abs()
        rank = percentile_rank(gap, self.labels)
        return feature_columns(found, agreement, self._cosines, rank)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a later sweep over the same pool and chunks needs to go on.

        Raises:
            RuntimeError: an exception cut a unit short, which would be counted twice.
        """
        if not self._whole:
            message = f"{OP}: a unit was cut short after {self.done}; load the last state, or start"
            raise RuntimeError(f"{message} afresh")
        return {name: value.clone() for name, value in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        parts = {"lists": self._lists, "centroids": self._centroids}
        return {
            **{f"{n}/{field}": v for n, part in parts.items() for field, v in vars(part).items()},
            "cosines": self._cosines,
            "distance": self._distance,
            "progress": torch.tensor([self.done, self.chunk]),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another sweep stopped.

        Raises:
            ValueError: the state is of another pool, chunk, k or neighbors; nothing is changed.
        """
        for name, value in self._state().items():
            got = state.get(name)
            if got is None or got.shape != value.shape or got.dtype != value.dtype:
                found = "nothing" if got is None else f"{got.dtype} {tuple(got.shape)}"
                expected = f"{value.dtype} {tuple(value.shape)}"
                fail(ValueError, OP, f"state[{name!r}]", expected, found, "start afresh")
        done, chunk = state["progress"].tolist()
        if chunk != self.chunk:
            fail(ValueError, OP, "chunk", f"{chunk}, as in the state", self.chunk, "start afresh")
        for name, value in self._state().items():
            value.copy_(state[name])
        self.done, self._whole = done, True

    def _rows(self, index: int) -> slice:
        start = self.starts[index]
        return slice(start, min(start + self.chunk, self.source.shape[0]))

    def _read(self, index: int) -> Tensor:
        """Chunk `index` [n, D], checked, in a dtype that is computed in."""
        rows = self._rows(index)
        part = check_floating(OP, "embeddings", self.source[rows], ndim=2).detach()
        check_finite(OP, "embeddings", part, BAD_ROWS, first=rows.start)
        return part if part.dtype in COMPUTED else part.float()

    def _unit_chunk(self, index: int) -> NeighborChunk:
        """Chunk `index` with rows of unit length."""
        rows = self._rows(index)
        unit = F.normalize(self._read(index), dim=1)
        return NeighborChunk(unit, self.labels[rows], self.is_synthetic[rows], rows.start)

    def _add_to_centroids(self, index: int) -> None:
        rows = self._rows(index)
        class_centroids_(
            self._centroids, self._read(index), self.labels[rows], self.is_synthetic[rows]
        )

    def _compare(self, first: int, second: int) -> None:
        # the first of a pair stays for the pairs that follow.
        held = {i: chunk for i, chunk in self._held.items() if i in (first, second)}
        self._held = {i: held.get(i) or self._unit_chunk(i) for i in {first, second}}
        neighbor_statistics_(self._lists, self._held[first], self._held[second])

    def _measure_distances(self, index: int) -> None:
        rows = self._rows(index)
        found = centroid_distances(self._read(index), self.labels[rows], self._centroids)
        self._cosines[rows], self._distance[rows] = found


def _check_class_sizes(labels: Tensor, synthetic: Tensor, names: Tensor, k: int) -> None:
    """Every class needs k others of each source that it or its opposite could ask for. `names` [C]
    are the classes as the caller numbers them."""
    hint = "pass small_class='pad' to accept this"
    for source, chosen in (("real", ~synthetic), ("synthetic", synthetic)):
        count = torch.bincount(labels[chosen], minlength=len(names))
        empty = names[count == 0].tolist()
        if empty:
            expected = f"such that every class has {source} samples"
            fail(ValueError, OP, "is_synthetic", expected, f"none in classes {empty[:5]}", hint)
        small = names[count <= k].tolist()
        if small:
            sizes = count[count <= k].tolist()
            expected = f"below the {source} samples of every class"
            fail(
                ValueError, OP, "k", expected, f"{k} with {sizes[:5]} in classes {small[:5]}", hint
            )
