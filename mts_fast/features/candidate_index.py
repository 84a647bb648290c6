"""Candidates for neighbours: inverted lists of product-quantised rows, by faiss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.features.pool_checks import OP

# inverted lists over the square root of the rows: looking up lists and rows then costs alike
LISTS_PER_ROOT = 2
# rows for each list in the sample that the lists are trained on; faiss advises 39 and more
TRAINING_ROWS = 40
# rounds of k-means; faiss's own default for lists
ITERATIONS = 10
# fewer rows are kept as they are: k-means of 16 centroids needs more
PLAIN_BELOW = 256
# numbers that one code of 4 bits stands for; 4 numbers a code had a recall 0.09 lower
# (60,000 x 256, 2026)
NUMBERS_A_CODE = 2
# the scan adds up one byte a code in 16 bits, so that more codes lose digits
MOST_CODES = 256
CODE_BITS = 4
NOBODY = -1  # faiss's number for an empty place


class Codebook:
    """Codes of 4 bits for rows [n, D]: a product quantiser, which all indexes of a pool share.

    Args:
        training: [T, D], a sample of the rows.
        seed: of the clustering.
    """

    def __init__(self, training: Tensor, seed: int) -> None:
        dimension = training.shape[1]
        self.codes = min(math.ceil(dimension / NUMBERS_A_CODE), MOST_CODES)
        self.width = math.ceil(dimension / self.codes) * self.codes  # D with zeros at the end
        self.quantizer: Any = None
        if len(training) < PLAIN_BELOW:
            return
        self.quantizer = faiss().ProductQuantizer(self.width, self.codes, CODE_BITS)
        clustering = self.quantizer.cp
        clustering.niter, clustering.seed = ITERATIONS, seed % 2**31
        # many small clusterings: threads would wait for one another for longer than they work
        with threads(1):
            self.quantizer.train(self.array(training))

    def array(self, unit: Tensor) -> np.ndarray:
        """Rows [n, D] as faiss takes them."""
        padded = torch.nn.functional.pad(unit.float(), (0, self.width - unit.shape[1]))
        return padded.cpu().contiguous().numpy()


class CandidateIndex:
    """An index of `size` unit rows, which are known by their numbers.

    Args:
        codebook: of the pool.
        training: [T, D], a sample of the rows.
        size: how many there will be.
        nlist: inverted lists; at most T.
        seed: of the clustering.
        keep: how many of the lowest numbers to keep, which serve a query that faiss has no answer
            for: a zero row, of cosine 0 to all.
    """

    def __init__(
        self, codebook: Codebook, training: Tensor, size: int, nlist: int, seed: int, keep: int
    ) -> None:
        self._codebook, self._keep = codebook, keep
        self.lowest = torch.zeros(0, dtype=torch.int64)
        self.size, self.nlist = size, 1
        width, metric = codebook.width, faiss().METRIC_INNER_PRODUCT
        self._inverted: Any = None
        self._index: Any = faiss().IndexIDMap(faiss().IndexFlat(width, metric))
        if size < PLAIN_BELOW:
            return
        self.nlist = min(nlist, len(training))
        options = {"niter": ITERATIONS, "seed": seed % 2**31, "min_points_per_centroid": 1}
        clustering = faiss().Kmeans(width, self.nlist, spherical=True, **options)
        with threads(torch.get_num_threads()):
            clustering.train(codebook.array(training))
        self._lists = faiss().IndexFlat(width, metric)  # the index has a pointer to it alone
        self._lists.add(clustering.centroids)
        self._index = self._inverted = faiss().IndexIVFPQFastScan(
            self._lists, width, self.nlist, codebook.codes, CODE_BITS, metric
        )
        self._inverted.by_residual = False  # so that the codebook is that of all lists
        self._inverted.pq, self._inverted.is_trained = codebook.quantizer, True

    @staticmethod
    def training_rows(size: int, nlist: int) -> int:
        """How many of `size` rows it is trained on."""
        return min(size, max(PLAIN_BELOW, TRAINING_ROWS * nlist))

    def add(self, unit: Tensor, numbers: Tensor) -> None:
        """Add rows [n, D] of samples `numbers` [n], ascending and above those before."""
        self.lowest = torch.cat([self.lowest, numbers.cpu()])[: self._keep]
        with threads(torch.get_num_threads()):
            self._index.add_with_ids(self._codebook.array(unit), numbers.cpu().numpy())

    def search(self, unit: Tensor, count: int, nprobe: int) -> Tensor:
        """Numbers [q, count] of the rows of largest inner product with rows [q, D], at most as many
        as there are; NOBODY where the lists that were looked through have no more."""
        count = min(count, self.size)
        if self._inverted is not None:
            self._inverted.nprobe = min(nprobe, self.nlist)
        with threads(torch.get_num_threads()):
            _, numbers = self._index.search(self._codebook.array(unit), count)
        return torch.from_numpy(numbers).to(unit.device)


def default_lists(size: int) -> int:
    """Inverted lists of that many rows."""
    return max(1, round(LISTS_PER_ROOT * math.sqrt(size)))


def faiss() -> Any:
    """The package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import faiss as package
    except ImportError as error:
        expected, hint = "'exact' without faiss", "pip install 'mts_fast[approximate]'"
        fail(ModuleNotFoundError, OP, "search", expected, f"approximate ({error})", hint)
    return package


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, faiss uses that many threads."""
    before = faiss().omp_get_max_threads()
    faiss().omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss().omp_set_num_threads(before)
