"""DistributionSweep: the distribution features of a pool, chunk by chunk, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mts_fast._check import (
    check_choice,
    check_device,
    check_finite,
    check_floating,
    check_mapping,
    check_pool,
    check_positive_int,
    check_readable,
    check_tensor,
    describe,
    fail,
)
from mts_fast.ops.class_centroids import ClassCentroids, class_centroids_
from mts_fast.ops.label_agreement import label_agreement
from mts_fast.ops.neighbor_statistics import NeighborChunk, NeighborLists, neighbor_statistics_
from mts_fast.ops.percentile_rank import percentile_rank
from mts_fast.reference.distribution_features import centroid_distances, feature_columns
from mts_fast.reference.neighbor_statistics import EXCLUDED
from mts_fast.reference.percentile_rank import class_median
from mts_fast.reference.unit_rows import unit_rows

OP = "distribution_features"
BAD_ROWS = "drop or repair these rows"
# rows of a chunk; two chunks are in memory at once. 8192 x 1024 float32 are 32 MB; packing them for
# the kernel costs 1 % of comparing them
CHUNK = 8192
# dtypes that chunks are compared in; half precision is converted
COMPUTED = (torch.float32, torch.float64)
AFRESH = "start afresh"


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
        size, dimension = _checked_shape(source)
        check_positive_int(OP, "chunk", chunk)
        check_sizes(size, k, neighbors, small_class)
        self.source = source
        self.labels, self.is_synthetic = check_pool(OP, labels, is_synthetic, size)
        # the caller's class numbers may be large: tables by class are indexed by 0, 1, ... C - 1
        names, self.labels = self.labels.unique(return_inverse=True)
        if small_class == "error":
            check_class_sizes(self.labels, self.is_synthetic, names, k)
        self.starts = range(0, size, chunk)
        self.chunk = chunk
        self.done = 0
        self._whole = True  # no unit was cut short
        like = self._read(0)[:0]
        for name, vector in (("labels", self.labels), ("is_synthetic", self.is_synthetic)):
            check_device(OP, name, vector, like.device, "embeddings")
        self._lists = NeighborLists.empty(size, k=k, neighbors=neighbors, like=like)
        self._centroids = ClassCentroids.empty(len(names), dimension, like.device)
        self._cosines = like.new_zeros(size, 3)
        self._distance = like.new_zeros(size, dtype=torch.float64)

    @property
    def total(self) -> int:
        """Units of work: T (T + 1) / 2 pairs of T chunks, and each chunk twice more."""
        count = len(self.starts)
        return count * (count + 1) // 2 + 2 * count

    def run(self) -> Iterator[int]:
        """Do what is left, unit by unit; yields how many are done.

        Raises:
            TypeError, ValueError: embeddings that are not [N, D], or not finite (with the rows).
            RuntimeError: an exception cut a unit short, or another run() did some of the work.
        """
        self._check_whole()
        self._held: dict[int, NeighborChunk] = {}
        for number, unit in enumerate(self._units()[self.done :], start=self.done):
            if number != self.done:
                got = f"{self.done} units done, where this one did {number}"
                fail(RuntimeError, OP, "run()", "alone", got, "exhaust one before the next")
            self._whole = False
            unit()
            self.done += 1
            self._whole = True
            yield self.done
        self._held.clear()

    def _units(self) -> list[Callable[[], None]]:
        """All units of work, in their order."""
        count = len(self.starts)
        pairs = ((a, b) for a in range(count) for b in range(a, count))
        return [
            *(partial(self._add_to_centroids, a) for a in range(count)),
            *(partial(self._compare, a, b) for a, b in pairs),
            *(partial(self._measure_distances, a) for a in range(count)),
        ]

    def columns(self) -> dict[str, Tensor]:
        """The features by name, each [N, width], once all units are done.

        Raises:
            RuntimeError: units are left.
        """
        if self.done < self.total:
            got = f"{self.done} of {self.total} units"
            fail(RuntimeError, OP, "run()", "exhausted first", got, "iterate over it to the end")
        statistics = self._lists.statistics()
        agreement = label_agreement(statistics.similarity, statistics.index, self.labels)
        gap = (self._distance - class_median(self._distance, self.labels)).abs()
        rank = percentile_rank(gap, self.labels).to(self._cosines.dtype)
        return feature_columns(statistics, agreement, self._cosines, rank)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a later sweep over the same pool and chunks needs to go on.

        Raises:
            RuntimeError: an exception cut a unit short, which would be counted twice.
        """
        self._check_whole()
        return {name: value.clone() for name, value in self._state().items()}

    def _check_whole(self) -> None:
        """A unit that was cut short would be counted twice."""
        if not self._whole:
            got = f"less: a unit was cut short after {self.done}"
            hint = "load the last state, or start afresh"
            fail(RuntimeError, OP, "the sweep", "of whole units", got, hint)

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
            TypeError, ValueError: the state is of another pool, chunk, k or neighbors, or damaged;
                nothing is changed.
        """
        check_mapping(OP, "state", state, "pass what state_dict() gave")
        for name, value in self._state().items():
            got = state.get(name)
            expected = f"{value.dtype} {tuple(value.shape)}"
            if not isinstance(got, Tensor):
                fail(ValueError, OP, f"state[{name!r}]", expected, describe(got), AFRESH)
            if got.shape != value.shape or got.dtype != value.dtype:
                actual = f"{got.dtype} {tuple(got.shape)}"
                fail(ValueError, OP, f"state[{name!r}]", expected, actual, AFRESH)
        done, chunk = state["progress"].tolist()
        if chunk != self.chunk:
            fail(ValueError, OP, "chunk", f"{chunk}, as in the state", self.chunk, AFRESH)
        if not 0 <= done <= self.total:
            fail(ValueError, OP, "state['progress']", f"in [0, {self.total}]", done, AFRESH)
        self._check_values(state, done)
        for name, value in self._state().items():
            value.copy_(state[name])
        self.done, self._whole = done, True

    def _check_values(self, state: Mapping[str, Tensor], done: int) -> None:
        """Refuse a state that `done` units cannot have left."""
        size, count = len(self.labels), len(self.starts)
        for name in ("centroids/sums", "distance"):
            check_finite(OP, f"state[{name!r}]", state[name], AFRESH)
        seen = min(min(done, count) * self.chunk, size)
        counts = state["centroids/counts"]
        if (counts < 0).any() or counts.sum() != seen:
            got = counts.sum(1).tolist()
            fail(ValueError, OP, "state['centroids/counts']", f"of {seen} samples", got, AFRESH)
        for name in ("lists/similarity", "lists/real", "lists/synthetic", "cosines"):
            # NaN fails this comparison, too
            if not state[name].abs().le(-EXCLUDED).all():
                fail(ValueError, OP, f"state[{name!r}]", "of cosines", "others", AFRESH)
        index = state["lists/index"]
        empty = state["lists/similarity"] == EXCLUDED
        if not (empty | ((index >= 0) & (index < size))).all():
            expected = f"in [0, {size})"
            fail(ValueError, OP, "state['lists/index']", expected, "others", AFRESH)
        if done >= self.total - count and empty.any():
            expected = f"full after {done} units"
            fail(ValueError, OP, "state['lists/similarity']", expected, "empty places", AFRESH)

    def _slice(self, index: int) -> slice:
        start = self.starts[index]
        return slice(start, min(start + self.chunk, self.source.shape[0]))

    def _read(self, index: int) -> Tensor:
        """Chunk `index` [n, D], checked, in a dtype that is computed in."""
        rows = self._slice(index)
        part = check_floating(OP, "embeddings", self.source[rows], ndim=2).detach()
        shape = (rows.stop - rows.start, self.source.shape[1])
        if part.shape != shape:
            expected = f"of shape {shape} in rows {rows.start} to {rows.stop - 1}"
            fail(ValueError, OP, "embeddings", expected, tuple(part.shape), "mend the source")
        check_finite(OP, "embeddings", part, BAD_ROWS, first=rows.start)
        return part if part.dtype in COMPUTED else part.float()

    def _unit_chunk(self, index: int) -> NeighborChunk:
        """Chunk `index` with rows of unit length."""
        rows = self._slice(index)
        unit = unit_rows(self._read(index))
        return NeighborChunk(unit, self.labels[rows], self.is_synthetic[rows], rows.start)

    def _add_to_centroids(self, index: int) -> None:
        rows = self._slice(index)
        class_centroids_(
            self._centroids, self._read(index), self.labels[rows], self.is_synthetic[rows]
        )

    def _compare(self, first: int, second: int) -> None:
        # of the previous pair only the chunks that this one needs stay in memory
        held = {i: chunk for i, chunk in self._held.items() if i in (first, second)}
        self._held = {i: held.get(i) or self._unit_chunk(i) for i in {first, second}}
        neighbor_statistics_(self._lists_of_pairs(), self._held[first], self._held[second])

    def _lists_of_pairs(self) -> NeighborLists:
        """What a pair of chunks is written to."""
        return self._lists

    def _measure_distances(self, index: int) -> None:
        rows = self._slice(index)
        cosines, distance = centroid_distances(
            self._read(index), self.labels[rows], self._centroids
        )
        check_distances(distance, rows.start)
        self._cosines[rows], self._distance[rows] = cosines, distance


def _checked_shape(source: object) -> tuple[int, int]:
    """(N, D) of a tensor, or of a source that is read like one."""
    if isinstance(source, Tensor):
        check_floating(OP, "embeddings", source)
        check_readable(OP, "embeddings", source)
    elif not hasattr(source, "shape") or not hasattr(source, "__getitem__"):
        check_tensor(OP, "embeddings", source)
    shape = tuple(source.shape)  # type: ignore[attr-defined]
    if len(shape) != 2:
        fail(ValueError, OP, "embeddings", "2-dimensional", f"shape {shape}", "one row a sample")
    return shape


def check_sizes(size: int, k: int, neighbors: int, small_class: str) -> None:
    """Refuse options that do not fit a pool of that many samples."""
    for name, value in (("k", k), ("neighbors", neighbors)):
        check_positive_int(OP, name, value)
    check_choice(OP, "small_class", small_class, ("error", "pad"))
    if neighbors >= size:
        hint = "a sample is no neighbour of itself"
        fail(ValueError, OP, "neighbors", f"below the pool size {size}", neighbors, hint)
    if k > size:
        fail(ValueError, OP, "k", f"at most the pool size {size}", k, "no class is so large")


def check_distances(distance: Tensor, first: int = 0) -> None:
    """Refuse embeddings that are too large to be compared with a mean."""
    name = "the distance of embeddings to their class's mean"
    check_finite(OP, name, distance, "divide all of them by one number", first=first)


def check_class_sizes(labels: Tensor, synthetic: Tensor, names: Tensor, k: int) -> None:
    """Refuse a class with k samples of a source or fewer, as a sample is no neighbour of itself.
    `names` [C] are the classes as the caller numbers them."""
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
