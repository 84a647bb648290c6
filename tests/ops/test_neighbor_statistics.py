"""neighbor_statistics: every backend against the full matrix, and what must not change a bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import assert_bitwise
from pools import POOLS, many, pool, signs

from mts_fast import reference, use_backend
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import (
    NeighborChunk,
    NeighborLists,
    neighbor_statistics,
    neighbor_statistics_,
)

needs_cpp = pytest.mark.skipif(not extension().available, reason=extension().reason)
COUNTS = {"k": 3, "neighbors": 5}
PARTS = ("real", "synthetic", "closest", "similarity")


def truth(x, y, s, **counts):
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return reference.neighbor_statistics(unit, y, s, **(COUNTS | counts))


# one sample per block; a multiple of no panel, which divides no pool; one block for all.
@pytest.mark.parametrize("tile", [1, 50, None])
@pytest.mark.parametrize("make", POOLS)
def test_equals_full_matrix(make, tile, backend):
    x, y, s = make()
    result, expected = neighbor_statistics(x, y, s, tile=tile, **COUNTS), truth(x, y, s)
    for part in PARTS:
        # another order of summation; observed 4e-16
        torch.testing.assert_close(
            getattr(result, part), getattr(expected, part), rtol=0, atol=2e-15, msg=part
        )
    if make.__name__ not in ("zero_vectors", "one_dimension"):  # see the next test
        assert torch.equal(result.index, expected.index)


def test_ties_of_zero_vectors_and_of_one_dimension(backend):
    """All similarities are exact here, so that the lowest indices must win."""
    ones = torch.tensor([[1.0], [-1.0], [0.0], [1.0], [-3.0], [0.0], [2.0]])
    y, s = torch.zeros(7).long(), torch.zeros(7).bool()
    result = neighbor_statistics(ones, y, s, k=1, neighbors=4, tile=1)
    assert result.index.tolist() == [
        [3, 6, 2, 5],
        [4, 2, 5, 0],
        [0, 1, 3, 4],
        [0, 6, 2, 5],
        [1, 2, 5, 0],
        [0, 1, 2, 3],
        [0, 3, 2, 5],
    ]


@pytest.mark.parametrize(("k", "neighbors"), [(1, 1), (7, 2), (40, 39)])  # k above class sizes
@pytest.mark.parametrize("tile", [7, None])
def test_other_counts(k, neighbors, tile, backend):
    x, y, s = signs()
    result = neighbor_statistics(x, y, s, k=k, neighbors=neighbors, tile=tile)
    expected = truth(x, y, s, k=k, neighbors=neighbors)
    for part in (*PARTS, "index"):
        assert torch.equal(getattr(result, part), getattr(expected, part)), part


@pytest.mark.parametrize("size", [40, 131])
def test_names_of_classes_cost_nothing(size, backend):
    """Class numbers may be far apart: a table over their whole range would take terabytes."""
    x, y, s = many()
    result, expected = (NeighborLists.empty(len(x), **COUNTS, like=x) for _ in range(2))
    for lists, labels in ((result, 10**12 * y + 7), (expected, y)):
        chunks = split(x, labels, s, size)
        for i, a in enumerate(chunks):
            for b in chunks[i:]:
                neighbor_statistics_(lists, a, b)
    assert_bitwise(vars(result), vars(expected))
    assert_bitwise(
        vars(neighbor_statistics(x, 10**12 * y + 7, s)), vars(neighbor_statistics(x, y, s))
    )


# depths below, at and above the kernel's runs of 128; sizes around its panels of 6 to 48 rows
@pytest.mark.parametrize("dimension", [1, 3, 128, 131, 300])
@pytest.mark.parametrize("size", [6, 47, 48, 49, 193, 401])
def test_single_precision_is_as_good_as_torch(size, dimension, backend):
    x, y, s = pool(size, dimension, 3, dtype=torch.float32)
    expected = truth(x, y, s)
    result = neighbor_statistics(x, y, s, **COUNTS)
    unit = torch.nn.functional.normalize(x, dim=1)
    torch_error = (unit @ unit.T - (unit.double() @ unit.double().T)).abs().max()
    # the unit rows are rounded as well: half a unit in the last place of each entry
    bound = 2 * torch_error.item() + 2 * torch.finfo(torch.float32).eps
    for part in PARTS:
        error = (getattr(result, part).double() - getattr(expected, part)).abs().max()
        assert error <= bound, part
    exact = torch.nn.functional.normalize(x.double(), dim=1)
    named = (exact[:, None] * exact[result.index]).sum(2)
    assert (named - expected.similarity).abs().max() <= bound
    assert (result.index != torch.arange(size)[:, None]).all()


def split(x, y, s, size):
    unit = torch.nn.functional.normalize(x, dim=1)
    return NeighborChunk(unit, y, s, 0).split(size)


@pytest.mark.parametrize("order", ["forwards", "backwards", "swapped"])
@pytest.mark.parametrize("size", [1, 40, 131])
def test_pairs_of_chunks_in_any_order(size, order, backend):
    x, y, s = many()
    chunks = split(x, y, s, size)
    pairs = [(a, b) for i, a in enumerate(chunks) for b in chunks[i:]]
    if order == "backwards":
        pairs.reverse()
    elif order == "swapped":
        pairs = [(b, a) for a, b in pairs]
    lists = NeighborLists.empty(len(x), **COUNTS, like=x)
    for a, b in pairs:
        neighbor_statistics_(lists, a, b)
    result, expected = lists.statistics(), truth(x, y, s)
    assert torch.equal(result.index, expected.index)
    for part in PARTS:
        torch.testing.assert_close(
            getattr(result, part), getattr(expected, part), rtol=0, atol=2e-15
        )


@needs_cpp
def test_bits_depend_on_nothing_but_the_numbers():
    """Tiles, threads and chunks give the same lists, also among 300 samples with many ties."""
    threads = torch.get_num_threads()
    for x, y, s in (pool(401, 131, 3, dtype=torch.float32), pool(300, 2, 2, dtype=torch.float32)):
        x[200:] = x[:-200].clone()
        with use_backend("cpp"):
            expected = neighbor_statistics(x, y, s)
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    for tile in (1, 100, 500):
                        result = neighbor_statistics(x, y, s, tile=tile)
                        assert_bitwise(vars(result), vars(expected), f"{count}, {tile}")
            finally:
                torch.set_num_threads(threads)
            for size in (7, 100):
                chunks = split(x, y, s, size)
                lists = NeighborLists.empty(len(x), **COUNTS, like=x)
                for i, a in enumerate(chunks):
                    for b in chunks[i:]:
                        neighbor_statistics_(lists, b, a)
                assert_bitwise(vars(lists.statistics()), vars(expected), f"chunks of {size}")


PROBE = """
import sys, torch, pools
from mts_fast import use_backend, reference
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import neighbor_statistics
assert extension().info["isa"] == sys.argv[1], extension().info
for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 2e-15)):
    x, y, s = pools.pool(230, 200, 3, dtype=dtype)
    with use_backend("cpp"):
        result = neighbor_statistics(x, y, s, tile=64)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    expected = reference.neighbor_statistics(unit, y, s)
    for part in ("real", "synthetic", "closest", "similarity"):
        error = (getattr(result, part) - getattr(expected, part)).abs().max().item()
        assert error < bound, (part, error)
"""


@needs_cpp
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """Each in its own process, as the choice is made only once. Observed 2e-7 and 4e-16."""
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(extension().info["isa"]):
        pytest.skip(f"this machine has {extension().info['isa']} at best")
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = {**os.environ, "MTS_FAST_ISA": isa, "PYTHONPATH": helpers}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, isa], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_cpp
def test_schema():
    """Only the lists are written, the fake agrees, and the op survives torch.compile's tracing."""
    x, y, s = pool(20, 4, 2)
    order = (2 * y + s).argsort(stable=True)
    offsets = torch.tensor([0, *torch.bincount(2 * y + s, minlength=4).cumsum(0).tolist()])
    lists = NeighborLists.empty(20, **COUNTS, like=x)
    arguments = (x, order, offsets, 0, x, order, offsets, 0, *vars(lists).values(), 0)
    torch.library.opcheck(torch.ops.mts_fast.neighbor_statistics_.default, arguments)


def test_inputs_stay_as_they_are(backend):
    x, y, s = pool(40, 4, 2, dtype=torch.float16)
    stacked = torch.stack([x, -x], dim=2)
    strided = stacked[..., 0]
    before = stacked.clone()
    result = neighbor_statistics(strided, y.to(torch.int16), s.int(), **COUNTS)
    assert_bitwise(stacked, before)
    assert_bitwise(vars(result), vars(neighbor_statistics(x.float(), y, s, **COUNTS)))


X, Y, S = pool(24, 4, 2)
WITH_NAN = X.clone()
WITH_NAN[[3, 7], 1] = torch.nan


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), Y, S), {}, TypeError, "embeddings must be a floating"),
        ((X[0], Y, S), {}, ValueError, "embeddings must be 2-dim"),
        ((WITH_NAN, Y, S), {}, ValueError, r"infinity in 2 rows \(3, 7\); drop or repair"),
        ((X, Y[:-1], S), {}, ValueError, "labels must be of length 24"),
        ((X, Y - 1, S), {}, ValueError, "labels must be in .*number the classes from 0"),
        ((X, Y, S[:-1]), {}, ValueError, "is_synthetic must be of length 24"),
        ((X, Y, S), {"k": 0}, ValueError, "k must be a positive int, got 0"),
        ((X, Y, S), {"k": -1}, ValueError, "k must be a positive int, got -1"),
        ((X, Y, S), {"neighbors": 24}, ValueError, "neighbors must be below the pool size 24"),
        ((X, Y, S), {"k": 25}, ValueError, "k must be at most the pool size 24, got 25"),
        ((X, Y, S), {"tile": 0}, ValueError, "tile must be a positive int"),
        ((X[:0], Y[:0], S[:0]), {}, ValueError, "neighbors must be below the pool size 0"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"neighbor_statistics: .*{message}"):
        neighbor_statistics(*arguments, **options)


def test_chunks_that_do_not_fit():
    whole = NeighborChunk(X, Y, S, 0)
    lists = NeighborLists.empty(24, **COUNTS, like=X)
    with pytest.raises(ValueError, match="columns must be the same samples as rows, or none"):
        neighbor_statistics_(lists, whole, whole.part(3, 9))
    with pytest.raises(
        ValueError, match="rows must be within the lists of 20, got samples 0 to 24"
    ):
        neighbor_statistics_(NeighborLists.empty(20, **COUNTS, like=X), whole, whole)
    with pytest.raises(TypeError, match=r"columns.unit must be torch.float64 \[n, 4\]"):
        neighbor_statistics_(lists, whole.part(0, 9), NeighborChunk(X[9:].float(), Y[9:], S[9:], 9))
    strided = NeighborLists(*(t.T.contiguous().T for t in vars(lists).values()))
    with pytest.raises(ValueError, match="lists must be contiguous"):
        neighbor_statistics_(strided, whole, whole)
