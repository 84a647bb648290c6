"""The CUDA kernels against the reference: on the emulator everywhere, on a GPU where there is one.

The emulator (tests/cuda_emulator) runs the same source, called by the sweep of the package.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from comparison import assert_bitwise
from pools import POOLS, many, pool, signs

from mts_fast import reference, use_backend
from mts_fast.backends.cpp.class_centroids import add_groups
from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.cpp.neighbor_statistics import merge_tiles
from mts_fast.ops import (
    ClassCentroids,
    NeighborChunk,
    NeighborLists,
    label_agreement,
    neighbor_statistics,
)

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
COUNTS = {"k": 3, "neighbors": 5}
PARTS = ("real", "synthetic", "closest", "similarity", "index")


class Emulator:
    """The launchers as functions of tensors, with the signatures of the ops."""

    def __init__(self, library):
        self.library = library

    def _call(self, name, tensors, *numbers):
        function = self.library[f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}"]
        assert all(t.is_contiguous() for t in tensors)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        # the C functions take integers as int64 and the one float as a double
        function(*pointers, *(ctypes.c_double(n) if isinstance(n, float) else n for n in numbers))

    def merge_neighbors_(self, tile, rows, classes, columns, offsets, first, *lists):
        pointers = [t.data_ptr() for t in (tile, rows, classes, columns, offsets)]
        name = f"merge_neighbors_{str(tile.dtype).removeprefix('torch.')}"
        self.library[name](
            *map(ctypes.c_void_p, pointers),
            ctypes.c_int64(first),
            *(ctypes.c_void_p(t.data_ptr()) for t in lists),
            *map(ctypes.c_int64, (*tile.shape, lists[0].shape[1], lists[2].shape[1])),
        )

    def sum_groups_(self, embeddings, order, offsets, sums):
        sizes = (len(offsets) - 1, embeddings.shape[1])
        self._call("sum_groups", (embeddings, order, offsets, sums), *map(ctypes.c_int64, sizes))

    def label_agreement(self, similarity, neighbors, labels, epsilon=1e-8):
        out = [torch.full((len(labels),), torch.nan, dtype=similarity.dtype) for _ in range(2)]
        sizes = map(ctypes.c_int64, similarity.shape)
        self._call("label_agreement", (similarity, neighbors, labels, *out), *sizes, epsilon)
        return tuple(out)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("g++ is needed to compile the emulator")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    # out-of-bounds and undefined behaviour end the process; ASan does not know fibers.
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-x", "c++"]
    command += ["-fsanitize=undefined", "-fno-sanitize-recover", "-Wno-unknown-pragmas"]
    folder = ROOT / "tests" / "cuda_emulator"
    kernels = sorted(map(str, (ROOT / "csrc" / "cuda").glob("*.cu")))
    command += ["-I", str(folder), str(folder / "driver.cpp"), *kernels, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Emulator(ctypes.CDLL(str(library)))


def sweep(emulator, x, y, s, *, tile, chunk=None, k=3, neighbors=5):
    unit = torch.nn.functional.normalize(x, dim=1)
    lists = NeighborLists.empty(len(x), k=k, neighbors=neighbors, like=x)
    chunks = NeighborChunk(unit, y, s, 0).split(chunk or len(x))
    for i, a in enumerate(chunks):
        for b in chunks[i:]:
            merge_tiles(emulator.merge_neighbors_, lists, a, b, tile)
    return lists.statistics()


def exact(x, y, s, **counts):
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return reference.neighbor_statistics(unit, y, s, **(COUNTS | counts))


# tiles: below a warp and odd, a warp's size, everything
@pytest.mark.parametrize("tile", [7, 32, 1000])
@pytest.mark.parametrize("make", POOLS)
def test_neighbors(make, tile, emulator):
    x, y, s = make()
    result, expected = sweep(emulator, x, y, s, tile=tile), exact(x, y, s)
    for part in PARTS:
        if part == "index" and make.__name__ in ("zero_vectors", "one_dimension"):
            continue  # cosines of 1 are not exact in another order of summation
        # another order of summation; observed 4e-16
        torch.testing.assert_close(
            getattr(result, part), getattr(expected, part), rtol=0, atol=2e-15, msg=part
        )


@pytest.mark.parametrize(("k", "neighbors"), [(1, 1), (7, 2), (40, 39)])  # k above class sizes
def test_other_counts(k, neighbors, emulator):
    x, y, s = signs()
    result = sweep(emulator, x, y, s, tile=13, k=k, neighbors=neighbors)
    expected = exact(x, y, s, k=k, neighbors=neighbors)
    for part in PARTS:
        assert torch.equal(getattr(result, part), getattr(expected, part)), part


def test_bits_depend_on_nothing_but_the_numbers(emulator):
    """Tiles, chunks, the order of warps; the products of signs are exact in any order."""
    x, y, s = signs()
    expected = exact(x, y, s)
    for seed in range(3):
        emulator.library.set_seed(seed)
        for tile, chunk in ((1, None), (9, None), (40, 11), (5, 17)):
            result = sweep(emulator, x, y, s, tile=tile, chunk=chunk)
            assert_bitwise(vars(result), vars(expected), f"{tile}, {chunk}")


def test_single_precision(emulator):
    x, y, s = pool(131, 16, 3, dtype=torch.float32)
    result, expected = sweep(emulator, x, y, s, tile=50), exact(x, y, s)
    for part in PARTS[:-1]:
        # sums of 16 products in float32; observed 1e-7
        error = (getattr(result, part) - getattr(expected, part)).abs().max()
        assert error < 4e-7, part


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", POOLS)
def test_centroids(make, dtype, emulator):
    x, y, s = make()
    x = x.to(dtype)
    result, expected = (ClassCentroids.empty(9, x.shape[1], x.device) for _ in range(2))
    for part in torch.arange(len(x)).split(50):
        add_groups(emulator.sum_groups_, result, x[part].contiguous(), y[part], s[part])
        reference.class_centroids_(expected, x[part], y[part], s[part])
    # both add in order of index
    assert_bitwise(vars(result), vars(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (40, 5), (300, 7)]
)  # one row; below and above a block
def test_label_agreement(n, k, dtype, emulator):
    g = torch.Generator().manual_seed(0)
    similarity = torch.rand(n, k, generator=g, dtype=dtype)
    neighbors = torch.randint(n, (n, k), generator=g)
    labels = torch.randint(3, (n,), generator=g)
    result = emulator.label_agreement(similarity, neighbors, labels)
    expected = reference.label_agreement(similarity.double(), neighbors, labels)
    for mine, truth in zip(result, expected, strict=True):
        # the sums are double, the result rounds once or twice
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_neighbor_outside_the_pool(emulator):
    similarity, neighbors = torch.ones(3, 2), torch.tensor([[1, 2], [0, 3], [-1, 0]])
    plain, weighted = emulator.label_agreement(similarity, neighbors, torch.zeros(3).long())
    assert plain.isnan().tolist() == weighted.isnan().tolist() == [False, True, True]


def test_lanes_that_do_not_meet_are_an_error(tmp_path):
    """The emulator itself: a shuffle that only half the warp reaches."""
    if COMPILER is None:
        pytest.skip("g++ is needed to compile the emulator")
    source = tmp_path / "half.cpp"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        "void half() { if (threadIdx.x < 16) __ballot_sync(0xffffffffu, true); }\n"
        "int main() { MTS_FAST_LAUNCH([] { half(); }, 1, 32, nullptr); }\n".replace(
            ", nullptr)", ", nullptr, 0)"
        ).replace("[] { half(); }", "[](int) { half(); }")
    )
    folder = ROOT / "tests" / "cuda_emulator"
    command = [COMPILER, "-std=c++20", "-I", str(folder), str(source), "-o", tmp_path / "half"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "half"], capture_output=True, text=True)
    assert done.returncode != 0 and "16 of 32 lanes wait for the others" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("make", [many, signs])
def test_on_a_gpu(make):
    """Compiled, not emulated."""
    if not extension().info.get("cuda"):
        pytest.skip("the extension was built without CUDA")
    x, y, s = make()
    with use_backend("cpp"):
        statistics = neighbor_statistics(x.cuda(), y.cuda(), s.cuda(), tile=50)
        agreement = label_agreement(statistics.similarity, statistics.index, y.cuda())
    expected = exact(x, y, s)
    for part in PARTS:
        torch.testing.assert_close(
            getattr(statistics, part).cpu(), getattr(expected, part), rtol=0, atol=2e-15
        )
    truth = reference.label_agreement(expected.similarity, expected.index, y)
    torch.testing.assert_close(agreement[0].cpu(), truth[0], rtol=0, atol=1e-15)
