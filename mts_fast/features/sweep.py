"""DistributionSweep: the distribution features of a pool, chunk by chunk, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mts_fast._check import (
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
from mts_fast.features.all_pairs import AllPairs
from mts_fast.features.approximately import Approximately
from mts_fast.features.columns import Columns
from mts_fast.features.pool_checks import OP, check_class_sizes, check_distances, check_sizes
from mts_fast.features.pool_rows import EmbeddingSource, PoolRows
from mts_fast.features.recall import LISTS
from mts_fast.features.search import EXACT_NOTE, Approximate, search_options
from mts_fast.features.sources import ArraySource
from mts_fast.ops.class_centroids import ClassCentroids, class_centroids_
from mts_fast.ops.label_agreement import label_agreement
from mts_fast.ops.neighbor_statistics import NeighborLists
from mts_fast.ops.percentile_rank import percentile_rank
from mts_fast.reference.distribution_features import centroid_distances, feature_columns
from mts_fast.reference.neighbor_statistics import EXCLUDED
from mts_fast.reference.percentile_rank import class_median

# rows of a chunk; two chunks are in memory at once. 8192 x 1024 float32 are 32 MB; packing them for
# the kernel costs 1 % of comparing them
CHUNK = 8192
AFRESH = "start afresh"


class DistributionSweep:
    """Computes the distribution features of a pool that need not fit in memory, resumably.

    The work is a list of units: every chunk is read once for the class centroids, once with every
    later chunk for the neighbours, and once for the distances. Memory is O(chunk * D + N). An
    approximate search reads candidates by their numbers, which is quick in memory and in .npy
    files; it also keeps the codes of its index, about D / 4 bytes a sample, and twice that where
    classes are large.

    Args:
        source: [N, D] floating point; a tensor, a numpy array (memory-mapped, too), or anything
            with a shape and slices of rows.
        labels, is_synthetic, k, neighbors, small_class, search: as in `distribution_features`.
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
        source: EmbeddingSource | Tensor | np.ndarray,
        labels: Tensor,
        is_synthetic: Tensor,
        *,
        k: int = 3,
        neighbors: int = 5,
        small_class: str = "error",
        chunk: int = CHUNK,
        search: str | Approximate = "exact",
    ) -> None:
        if isinstance(source, np.ndarray):
            source = ArraySource.of(OP, "embeddings", source)
        size, dimension = _checked_shape(source)
        check_positive_int(OP, "chunk", chunk)
        options = search_options(search)
        check_sizes(size, k, neighbors, small_class)
        self.source = source
        self.labels, self.is_synthetic = check_pool(OP, labels, is_synthetic, size)
        # the caller's class numbers may be large: tables by class are indexed by 0, 1, ... C - 1
        names, self.labels = self.labels.unique(return_inverse=True)
        if small_class == "error":
            check_class_sizes(self.labels, self.is_synthetic, names, k)
        self._rows = PoolRows(source, self.labels, self.is_synthetic, chunk)
        self.starts, self.chunk = self._rows.starts, chunk
        self.done = 0
        self._whole = True  # no unit was cut short
        like = self._rows.read(0)[:0]
        for name, vector in (("labels", self.labels), ("is_synthetic", self.is_synthetic)):
            check_device(OP, name, vector, like.device, "embeddings")
        self._lists = NeighborLists.empty(size, k=k, neighbors=neighbors, like=like)
        self._centroids = ClassCentroids.empty(len(names), dimension, like.device)
        self._cosines = like.new_zeros(size, 3)
        self._distance = like.new_zeros(size, dtype=torch.float64)
        self._neighbors = self._searched(options, k, neighbors)

    def _searched(
        self, options: Approximate | None, k: int, neighbors: int
    ) -> AllPairs | Approximately:
        """What fills the lists."""
        if options is None:
            return AllPairs(self._rows, self._lists, None)
        if self._rows.size < options.exact_below:
            return AllPairs(self._rows, self._lists, dict(EXACT_NOTE))
        return Approximately(self._rows, self._lists, options, k=k, neighbors=neighbors)

    @property
    def total(self) -> int:
        """Units of work: T (T + 1) / 2 pairs of T chunks, or T chunks, a sample and the packs of
        small classes where the search is approximate; and each chunk twice more."""
        return self._neighbors.total + 2 * len(self.starts)

    def run(self) -> Iterator[int]:
        """Do what is left, unit by unit; yields how many are done.

        Raises:
            TypeError, ValueError: embeddings that are not [N, D], or not finite (with the rows).
            RuntimeError: an exception cut a unit short, or another run() did some of the work.
        """
        self._check_whole()
        for number, unit in enumerate(self._units()[self.done :], start=self.done):
            if number != self.done:
                got = f"{self.done} units done, where this one did {number}"
                fail(RuntimeError, OP, "run()", "alone", got, "exhaust one before the next")
            self._whole = False
            unit()
            self.done += 1
            self._whole = True
            yield self.done
        self._neighbors.release()

    def _units(self) -> list[Callable[[], None]]:
        """All units of work, in their order."""
        count = len(self.starts)
        return [
            *(partial(self._add_to_centroids, a) for a in range(count)),
            *self._neighbors.units(),
            *(partial(self._measure_distances, a) for a in range(count)),
        ]

    def columns(self) -> Columns:
        """The features by name, each [N, width], once all units are done; with notes on the recall
        of an approximate search.

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
        columns = feature_columns(statistics, agreement, self._cosines, rank)
        return Columns(columns, self._neighbors.notes(tuple(LISTS)))

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
            **self._neighbors.state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another sweep stopped.

        Raises:
            TypeError, ValueError: the state is of another pool, chunk, k, neighbors or search, or
                damaged; nothing is changed.
        """
        check_mapping(OP, "state", state, "pass what state_dict() gave")
        if "setting" in state and "setting" not in self._state():
            hint = "pass the same search, or start afresh"
            fail(ValueError, OP, "search", "approximate, as in the state", "exact", hint)
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
        for name in self._state():
            # NaN fails this comparison, too
            cosines = name.endswith(("/similarity", "/real", "/synthetic", "cosines"))
            if cosines and not state[name].abs().le(-EXCLUDED).all():
                fail(ValueError, OP, f"state[{name!r}]", "of cosines", "others", AFRESH)
            if name.endswith("/index"):
                empty = state[name.replace("index", "similarity")] == EXCLUDED
                if not (empty | ((state[name] >= 0) & (state[name] < size))).all():
                    expected = f"in [0, {size})"
                    fail(ValueError, OP, f"state[{name!r}]", expected, "others", AFRESH)
        self._neighbors.check_state(state)
        empty = state["lists/similarity"] == EXCLUDED
        if done >= self.total - count and empty.any():
            expected = f"full after {done} units"
            fail(ValueError, OP, "state['lists/similarity']", expected, "empty places", AFRESH)

    def _add_to_centroids(self, index: int) -> None:
        rows = self._rows.slice(index)
        class_centroids_(
            self._centroids, self._rows.read(index), self.labels[rows], self.is_synthetic[rows]
        )

    def _measure_distances(self, index: int) -> None:
        rows = self._rows.slice(index)
        cosines, distance = centroid_distances(
            self._rows.read(index), self.labels[rows], self._centroids
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
