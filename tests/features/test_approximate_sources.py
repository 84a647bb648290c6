"""Approximate search of embeddings in files: bounded memory, and sweeps that resume."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import assert_bitwise
from rank_pool import SLOW
from safetensors.torch import save_file
from searched_pools import clusters

from mts_fast.features import (
    Approximate,
    DistributionSweep,
    FeatureTable,
    distribution_features,
    open_embeddings,
)

pytest.importorskip("faiss")

X, Y, S = clusters(2000)
SEARCH = Approximate(exact_below=400, queries=100)
CHUNK = 300


@pytest.fixture(scope="module")
def expected():
    return distribution_features(X, Y, S, search=SEARCH, chunk=CHUNK)


def finished(sweep):
    for _ in sweep.run():
        pass
    return sweep.columns()


@pytest.mark.parametrize("kind", ["array", "memmap", "npy", "npz", "safetensors"])
def test_files_give_the_bits_of_the_tensor(kind, tmp_path, expected):
    """safetensors are read by slices alone."""
    file = tmp_path / f"x.{kind}"
    if kind == "array":
        source = X.numpy()
    elif kind == "safetensors":
        save_file({"x": X}, file)
        source = open_embeddings(file)
    elif kind == "npz":
        np.savez(file, x=X.numpy())
        source = open_embeddings(file)
    else:
        np.save(tmp_path / "x.npy", X.numpy())
        source = open_embeddings(tmp_path / "x.npy")
        if kind == "memmap":
            source = np.load(tmp_path / "x.npy", mmap_mode="r")
    columns = distribution_features(source, Y, S, search=SEARCH, chunk=CHUNK)
    assert_bitwise(columns, expected)
    assert columns.notes == expected.notes


def test_exact_search_of_an_array():
    columns = distribution_features(X.numpy(), Y, S, chunk=CHUNK)
    assert_bitwise(columns, distribution_features(X, Y, S, chunk=CHUNK))


def test_a_sweep_resumes_after_every_unit(expected):
    sweep = DistributionSweep(X, Y, S, search=SEARCH, chunk=CHUNK)
    units = sweep.run()
    # 7 chunks: centroids, the sample, search, packs of the small class, distances
    assert sweep.total == 7 + 1 + 7 + 1 + 7
    states = [sweep.state_dict(), *(sweep.state_dict() for _ in units)]
    # within and after each kind of unit
    for done in (0, 3, 7, 8, 11, 15, 16, 20, 23):
        other = DistributionSweep(X, Y, S, search=SEARCH, chunk=CHUNK)
        other.load_state_dict(states[done])
        columns = finished(other)
        assert_bitwise(columns, expected)
        assert columns.notes == expected.notes


def test_states_of_another_search_are_refused():
    exact, sweep = (
        DistributionSweep(X, Y, S, chunk=CHUNK, search=search) for search in ("exact", SEARCH)
    )
    with pytest.raises(ValueError, match="search must be approximate, as in the state, got exact"):
        exact.load_state_dict(sweep.state_dict())
    with pytest.raises(ValueError, match=r"state\['sample/similarity'\] must be torch.float32"):
        sweep.load_state_dict(exact.state_dict())
    other = Approximate(exact_below=400, queries=100, seed=1)
    with pytest.raises(ValueError, match=r"search must be with the options .*seed=1\); pass the"):
        DistributionSweep(X, Y, S, chunk=CHUNK, search=other).load_state_dict(sweep.state_dict())
    damaged = sweep.state_dict()
    damaged["setting"][0] = -1
    with pytest.raises(ValueError, match=r"state\['setting'\] must be of 0 or more"):
        sweep.load_state_dict(damaged)
    damaged = sweep.state_dict()
    damaged["sample/real"][:] = 9
    with pytest.raises(ValueError, match=r"state\['sample/real'\] must be of cosines"):
        sweep.load_state_dict(damaged)


def test_a_broken_chunk_names_its_rows(tmp_path):
    x = X.clone()
    x[1234, 3] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ValueError, match=r"embeddings must be finite, got .* 1 rows \(1234\)"):
        distribution_features(open_embeddings(tmp_path / "x.npy"), Y, S, search=SEARCH)


def anonymous():
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise KeyError("RssAnon")


def peak_anonymous(call):
    """Most of them during a call, above those before."""
    before = peak = anonymous()
    stop = threading.Event()

    def watch():
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    stop.set()
    thread.join()
    return peak - before


@SLOW
def test_memory_is_bounded(tmp_path):
    """40,000 x 1024 float32 are 164 MB. Codes take 5, training rows and a copy 10, candidates 16,
    chunks and their unit rows 4 each, the result 3; the rest is the allocator's."""
    shape = (40_000, 1024)
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f4", shape)
    g = np.random.default_rng(0)
    for start in range(0, shape[0], 2000):
        array[start : start + 2000] = g.standard_normal((2000, shape[1]), "f4")
    array.flush()
    labels, synthetic = torch.arange(shape[0]) % 40, torch.arange(shape[0]) % 3 > 0
    search = Approximate(exact_below=5000, nlist=32, nprobe=2, candidates=4, queries=50)

    def call():
        source = np.load(tmp_path / "x.npy", mmap_mode="r")
        distribution_features(source, labels, synthetic, search=search, chunk=1000)

    distribution_features(X, Y, S, search=SEARCH)  # libraries and threads
    assert peak_anonymous(call) < 82 * 2**20  # observed 41 to 62 MB at half of the samples


def test_notes_are_saved_with_their_columns(tmp_path, expected):
    table = FeatureTable(expected)
    table.save(tmp_path / "table.safetensors")
    loaded = FeatureTable.load(tmp_path / "table.safetensors")
    assert loaded.notes == expected.notes == table.notes
    assert FeatureTable(loaded).notes == expected.notes
    exact = distribution_features(X, Y, S)
    loaded.update({"class_nearest_cosine": exact["class_nearest_cosine"]})
    assert set(loaded.notes) == set(expected.notes) - {"class_nearest_cosine"}
    loaded.update(exact)
    assert loaded.notes == {}
    loaded.save(tmp_path / "a.safetensors")
    FeatureTable(dict(loaded)).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_damaged_notes_are_refused(tmp_path, expected):
    file = tmp_path / "table.safetensors"
    FeatureTable(expected).save(file)
    recall = str(expected.notes["class_nearest_cosine"]["recall"]).encode()
    content = file.read_bytes()
    assert content.count(recall) >= 1
    file.write_bytes(content.replace(recall, b"9" * len(recall)))
    with pytest.raises(ValueError, match="must be as it was saved, got data of another checksum"):
        FeatureTable.load(file)
