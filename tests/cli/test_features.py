"""`mts-fast features`: the table of a pool in files, and refused arguments."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from comparison import assert_bitwise
from features_command import S, X, Y, run, table
from safetensors.torch import save_file

from mts_fast._files import locked
from mts_fast.cli.main import main
from mts_fast.features import DistributionSweep, FeatureTable, distribution_features


def test_table_equals_the_function(pool, tmp_path, capsys):
    assert run(pool, tmp_path, "--chunk", "50", "-k", "2", "--neighbors", "4") == 0
    assert "9 columns of 131 samples" in capsys.readouterr().out
    assert_bitwise(
        table(tmp_path), dict(distribution_features(X, Y, S, k=2, neighbors=4, chunk=50))
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.npz", "table.safetensors"]


def test_other_formats_and_files(tmp_path):
    save_file({"anything": X.half()}, tmp_path / "x.safetensors")
    np.save(tmp_path / "y.npy", Y.numpy().astype(np.int16))
    np.save(tmp_path / "s.npy", S.numpy().astype(np.uint8))
    names = [str(tmp_path / name) for name in ("x.safetensors", "y.npy", "s.npy")]
    pool = [names[0], "--labels", names[1], "--is-synthetic", names[2]]
    assert run(pool, tmp_path) == 0
    assert_bitwise(table(tmp_path), dict(distribution_features(X.half(), Y, S)))


def test_columns_of_an_existing_table_stay(pool, tmp_path):
    FeatureTable({"loss": torch.arange(131.0)}).save(tmp_path / "table.safetensors")
    assert run(pool, tmp_path) == 0
    assert list(table(tmp_path)) == ["loss", *distribution_features(X, Y, S)]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from mts_fast.cli.main import main
from mts_fast.features import sweep as sweep_module
sys.exit(main(sys.argv[1:]))
"""


def test_disk_that_takes_no_more(pool, tmp_path):
    """Files limited to 4 KiB, in a subprocess: the old table stays."""
    target = tmp_path / "table.safetensors"
    FeatureTable({"loss": torch.arange(131.0)}).save(target)
    before = target.read_bytes()
    command = [sys.executable, "-c", LIMITED, "features", *pool, "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out must be writable" in done.stderr and "the old file is unchanged" in done.stderr
    assert target.read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.npz", "table.safetensors"]


def test_refusals(pool, tmp_path, capsys):
    out = tmp_path / "table.safetensors"
    bad = X.clone()
    bad[[60, 100], 3] = torch.inf
    np.save(tmp_path / "bad.npy", bad.numpy())
    assert run([str(tmp_path / "bad.npy"), *pool[1:]], tmp_path, "--chunk", "50") == 2
    said = "features: FILE must be finite, got NaN or infinity in 1 rows (60); drop or repair"
    assert said in capsys.readouterr().err
    FeatureTable({"loss": torch.arange(5.0)}).save(out)
    assert run(pool, tmp_path) == 2
    assert "--out must be a table of 131 samples, or a new file, got one of 5" in (
        capsys.readouterr().err
    )
    out.write_text("notes")
    assert run(pool, tmp_path) == 2
    assert f"features: --out {out}: file {str(out)!r} must be" in capsys.readouterr().err
    assert out.read_text() == "notes"
    out.unlink()
    assert run(pool, tmp_path, "--neighbors", "131") == 2
    assert "features: --neighbors must be below the pool size 131" in capsys.readouterr().err
    assert run(pool, tmp_path, "-k", "100") == 2
    said = capsys.readouterr().err
    assert "features: -k must be below the" in said and "; pass --small-class pad to accept" in said
    assert run(pool, tmp_path, "--chunk", "1e3") == 2
    said = "features: --chunk must be a whole number from 1 to 9223372036854775807, got '1e3'"
    assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("flag", ["FILE", "--labels", "--is-synthetic"])
def test_errors_name_the_flag_and_its_file(flag, pool, tmp_path, capsys):
    place = {"FILE": 0, "--labels": 2, "--is-synthetic": 4}[flag]
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    (tmp_path / "words.npy").write_text("words")
    whole = pool[0].removesuffix(":x")
    cube, words = str(tmp_path / "cube.npy"), str(tmp_path / "words.npy")
    for spec, said in {
        "nowhere.npy": f"{flag} must be an existing file, got 'nowhere.npy'; check the name",
        cube: f"{flag} {cube}: file {cube!r} must be ",
        words: f"{flag} {words}: file {words!r} must be a complete .npy file",
        whole: f"{flag} {whole}: KEY must be one of ['s', 'x', 'y'] in {whole!r}, got none",
        f"{whole}:z": f"KEY must be one of ['s', 'x', 'y'] in {whole!r}, got 'z'",
    }.items():
        assert run([*pool[:place], spec, *pool[place + 1 :]], tmp_path) == 2
        assert said in capsys.readouterr().err


def test_labels_and_flags_are_whole_numbers_of_the_pool(pool, tmp_path, capsys):
    y, s = Y.numpy(), S.numpy()
    for place, values, said in (
        (2, y[:-1], "of length 131, one number for each row of the embeddings, got 130; name"),
        (2, y.astype("f4"), "of whole numbers, got a float32 tensor of shape (131,); save them as"),
        (2, s, "of whole numbers, got a bool tensor of shape (131,); save them as int64"),
        (2, y - 1, "in [0, 9223372036854775807), got values from -1 to 5; number the classes from"),
        (4, s.astype("f8"), "of whole numbers, got a float64 tensor of shape (131,); save them as"),
        (4, y, "in [0, 2), got values from 0 to 6; 0 is a real sample, 1 a synthetic one"),
        (4, np.concatenate([s, s]), "of length 131, one number for each row of the embeddings"),
    ):
        file = str(tmp_path / "vector.npy")
        np.save(file, values)
        assert run([*pool[:place], file, *pool[place + 1 :]], tmp_path) == 2
        assert f"features: {pool[place - 1]} {file} must be {said}" in capsys.readouterr().err
    np.save(tmp_path / "unsigned.npy", y.astype(np.uint32))
    assert run([*pool[:2], str(tmp_path / "unsigned.npy"), *pool[3:]], tmp_path) == 2
    assert "got dtype uint32; save it as int64" in capsys.readouterr().err


def test_out_is_tried_before_the_work(pool, tmp_path, monkeypatch, capsys):
    def not_reached(*_):
        raise AssertionError("the pool was opened")

    monkeypatch.setattr("mts_fast.cli.features.PoolFile", not_reached)
    folder = tmp_path / "folder"
    folder.mkdir()
    for out, said in {
        "": "--out must be a path, got an empty one",
        str(folder): f"--out must be of a file, or new, got the folder {str(folder)!r}; name",
        "/dev/null": "--out must be of a file, or new, got '/dev/null', a device or a pipe",
        str(tmp_path / "no" / "t.safetensors"): "--out must be in an existing folder, got",
        "/proc/t.safetensors": "--out must be in a writable folder, got '/proc' (",
    }.items():
        assert main(["features", *pool, "--out", out]) == 2
        assert said in capsys.readouterr().err


def test_columns_that_another_process_saves_meanwhile_survive(pool, tmp_path, monkeypatch):
    out = tmp_path / "table.safetensors"
    whole = DistributionSweep.columns

    def columns(self):
        FeatureTable({"loss": torch.arange(131.0)}).save(out)
        return whole(self)

    monkeypatch.setattr(DistributionSweep, "columns", columns)
    assert run(pool, tmp_path) == 0
    assert list(table(tmp_path)) == ["loss", *distribution_features(X, Y, S)]


def test_two_saves_wait_for_one_another(pool, tmp_path):
    """While another process holds the folder's lock the table is not read; the later read sees the
    columns that were saved meanwhile."""
    out = tmp_path / "table.safetensors"
    command = [sys.executable, "-m", "mts_fast.cli.main", "features", *pool, "--out", str(out)]
    with locked(tmp_path) as alone:
        assert alone
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "3 of 3" in line:
                break
        FeatureTable({"loss": torch.arange(131.0)}).save(out)
        assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert list(table(tmp_path)) == ["loss", *distribution_features(X, Y, S)]


def test_what_a_killed_process_left_is_removed(pool, tmp_path):
    """An old folder is removed if no process holds its lock; new ones stay."""
    dead, alive, new = (tmp_path / f".mts_fast-{name}" for name in ("dead", "alive", "new"))
    for folder in (dead, alive, new):
        folder.mkdir()
        (folder / "table.safetensors").touch()
    for folder in (dead, alive):
        os.utime(folder, (0, 0))
    with locked(alive):
        assert run(pool, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".mts_fast-alive", ".mts_fast-new"]
