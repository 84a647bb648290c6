"""`mts-fast features`: the table of a pool in files, interrupted, resumed, and refused."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from comparison import assert_bitwise
from pools import many, zero_vectors
from safetensors import safe_open
from safetensors.torch import save_file

from mts_fast.cli.main import main
from mts_fast.features import DistributionSweep, FeatureTable, distribution_features
from mts_fast.features import sweep as sweep_module

X, Y, S = many()


@pytest.fixture
def pool(tmp_path):
    """The arguments that name one file with everything; the table is to be there, too."""
    np.savez(tmp_path / "pool.npz", x=X.numpy(), y=Y.numpy(), s=S.numpy())
    file = str(tmp_path / "pool.npz")
    return [f"{file}:x", "--labels", f"{file}:y", "--is-synthetic", f"{file}:s"]


def run(pool, tmp_path, *options):
    return main(["features", *pool, "--out", str(tmp_path / "table.safetensors"), *options])


def table(tmp_path):
    return dict(FeatureTable.load(tmp_path / "table.safetensors"))


def test_table_equals_the_function(pool, tmp_path, capsys):
    assert run(pool, tmp_path, "--chunk", "50", "-k", "2", "--neighbors", "4") == 0
    assert "9 columns of 131 samples" in capsys.readouterr().out
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S, k=2, neighbors=4, chunk=50))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.npz", "table.safetensors"]


def test_other_formats_and_files(tmp_path):
    save_file({"anything": X.half()}, tmp_path / "x.safetensors")
    np.save(tmp_path / "y.npy", Y.numpy().astype(np.int16))
    np.save(tmp_path / "s.npy", S.numpy().astype(np.uint8))
    names = [str(tmp_path / name) for name in ("x.safetensors", "y.npy", "s.npy")]
    pool = [names[0], "--labels", names[1], "--is-synthetic", names[2]]
    assert run(pool, tmp_path) == 0
    assert_bitwise(table(tmp_path), distribution_features(X.half(), Y, S))


def test_columns_of_an_existing_table_stay(pool, tmp_path):
    FeatureTable({"loss": torch.arange(131.0)}).save(tmp_path / "table.safetensors")
    assert run(pool, tmp_path) == 0
    assert list(table(tmp_path)) == ["loss", *distribution_features(X, Y, S)]


def signalled(units, number):
    """run(), to which a signal comes in the unit after `units`; and what was done, unit by unit."""
    whole = DistributionSweep.run
    seen = []

    def run(self):
        for done in whole(self):
            seen.append(done)
            if done == units + 1:
                os.kill(os.getpid(), number)
            yield done

    return run, seen


# in the first unit, reading, comparing, measuring; as a user and as a batch system does it
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("units", [0, 2, 7, 15])
def test_interrupted_and_resumed(units, number, pool, tmp_path, monkeypatch, capsys):
    options = ("--chunk", "40")
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(units, number)[0])
        assert run(pool, tmp_path, *options) == 130
    message = f"interrupted at {units + 1} of 18; the same command goes on from there"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "table.safetensors").exists()
    patched, seen = signalled(99, number)
    monkeypatch.setattr(DistributionSweep, "run", patched)
    assert run(pool, tmp_path, *options) == 0
    assert seen == list(range(units + 2, 19))
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S, chunk=40))
    assert not (tmp_path / "table.safetensors.partial").exists()
    assert signal.getsignal(number) is handler


def test_progress_of_another_pool_is_refused(pool, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(0, signal.SIGINT)[0])
        assert run(pool, tmp_path) == 130
    assert run(pool, tmp_path, "--chunk", "7") == 2
    assert "chunk must be 8192, as in the state, got 7" in capsys.readouterr().err
    assert run(pool, tmp_path, "-k", "2") == 2
    assert "state['lists/real'] must be" in capsys.readouterr().err
    np.savez(tmp_path / "pool.npz", x=-X.numpy(), y=Y.numpy(), s=S.numpy())
    assert run(pool, tmp_path) == 2
    assert "left by a run on the same pool" in capsys.readouterr().err
    assert run(pool, tmp_path, "--no-resume") == 0
    assert_bitwise(table(tmp_path), distribution_features(-X, Y, S))


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from mts_fast.cli.main import main
from mts_fast.features import sweep as sweep_module
sys.exit(main(sys.argv[1:]))
"""


def test_disk_that_takes_no_more(pool, tmp_path):
    """A limit of 4 KiB a file, in a process of its own: the old table stays."""
    target = tmp_path / "table.safetensors"
    FeatureTable({"loss": torch.arange(131.0)}).save(target)
    before = target.read_bytes()
    command = [sys.executable, "-c", LIMITED, "features", *pool, "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "path must be writable" in done.stderr and "the old file is unchanged" in done.stderr
    assert target.read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.npz", "table.safetensors"]


def test_refusals(pool, tmp_path, capsys):
    out = tmp_path / "table.safetensors"
    bad = X.clone()
    bad[[60, 100], 3] = torch.inf
    np.save(tmp_path / "bad.npy", bad.numpy())
    assert run([str(tmp_path / "bad.npy"), *pool[1:]], tmp_path, "--chunk", "50") == 2
    assert "NaN or infinity in 1 rows (60); drop or repair" in capsys.readouterr().err
    assert run([str(tmp_path / "nowhere.npy"), *pool[1:]], tmp_path) == 2
    assert "existing file" in capsys.readouterr().err
    np.save(tmp_path / "short.npy", Y[:-1].numpy())
    short = str(tmp_path / "short.npy")
    assert run([pool[0], "--labels", short, *pool[3:]], tmp_path) == 2
    assert "labels must be of length 131" in capsys.readouterr().err
    FeatureTable({"loss": torch.arange(5.0)}).save(out)
    assert run(pool, tmp_path) == 2
    assert "--out must be a table of 131 samples, or a new file, got one of 5" in (
        capsys.readouterr().err
    )
    out.write_text("notes")
    assert run(pool, tmp_path) == 2
    assert out.read_text() == "notes"
    assert main(["features", *pool, "--out", str(tmp_path / "no" / "t.safetensors")]) == 2
    assert "--out must be in an existing folder" in capsys.readouterr().err
    out.unlink()
    assert run([*pool[:-1], pool[2]], tmp_path, "--no-resume") == 2
    assert "is_synthetic must be in [0, 2), got values from 0 to 6" in capsys.readouterr().err


def test_state_of_a_sweep_is_its_own():
    """Loading copies, and a state of other sizes changes nothing."""
    x, y, s = zero_vectors()
    sweep = DistributionSweep(x, y, s, chunk=10)
    units = sweep.run()
    next(units)
    state = sweep.state_dict()
    copy = {name: value.clone() for name, value in state.items()}
    other = DistributionSweep(x, y, s, chunk=10)
    other.load_state_dict(state)
    for _ in other.run():
        pass
    assert_bitwise(state, copy)
    assert sweep.done == 1
    with pytest.raises(RuntimeError, match=r"exhausted first, got 1 of 12 units"):
        sweep.columns()
    with pytest.raises(ValueError, match=r"state\['lists/similarity'\] must be .*; start afresh"):
        DistributionSweep(x, y, s, chunk=10, neighbors=2).load_state_dict(state)


def test_unit_cut_short(monkeypatch):
    """Its samples would be counted twice: no state is given, and a whole one can be loaded."""
    sweep = DistributionSweep(X, Y, S, chunk=50)
    units = sweep.run()
    state = [sweep.state_dict() for _ in zip(range(4), units, strict=False)][-1]
    whole = sweep_module.neighbor_statistics_

    def broken(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "neighbor_statistics_", broken)
        with pytest.raises(KeyboardInterrupt):
            next(units)
    with pytest.raises(RuntimeError, match="a unit was cut short after 4; load the last state"):
        sweep.state_dict()
    sweep.load_state_dict(state)
    assert list(sweep.run()) == list(range(5, 13))
    assert_bitwise(sweep.columns(), distribution_features(X, Y, S, chunk=50))


def test_partial_file_says_what_it_is(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("mts_fast.cli.features.SAVE_SECONDS", 0.0)
    kept = []

    def keep(self):
        with safe_open(self.path, framework="pt") as file:
            kept.append((file.metadata()["format"], file.get_tensor("progress").tolist()))
        self.path.unlink()

    monkeypatch.setattr("mts_fast.cli.features._Progress.remove", keep)
    assert run(pool, tmp_path, "--chunk", "60") == 0
    assert kept == [("mts_fast.DistributionSweep/1", [12, 60])]
