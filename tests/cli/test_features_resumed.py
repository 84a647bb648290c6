"""`mts-fast features`, interrupted and resumed: the partial file, and pools that change."""

import os
import signal

import numpy as np
import pytest
import torch
from comparison import assert_bitwise
from features_command import S, X, Y, run, signalled, table
from safetensors import safe_open
from safetensors.torch import save_file

from mts_fast.features import DistributionSweep, distribution_features


# in the first unit, while reading, comparing and measuring; by Ctrl-C and by a batch system
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
    assert_bitwise(table(tmp_path), dict(distribution_features(X, Y, S, chunk=40)))
    assert not (tmp_path / "table.safetensors.partial").exists()
    assert signal.getsignal(number) is handler


def test_progress_of_another_pool_is_refused(pool, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(0, signal.SIGINT)[0])
        assert run(pool, tmp_path) == 130
    assert run(pool, tmp_path, "--chunk", "7") == 2
    partial = str(tmp_path / "table.safetensors.partial")
    said = f"--chunk must be 8192, as in {partial!r}, got 7; pass --chunk 8192, or start afresh"
    assert said in capsys.readouterr().err
    assert run(pool, tmp_path, "-k", "2") == 2
    assert f"-k must be 3, as in {partial!r}, got 2; pass -k 3, or start" in capsys.readouterr().err
    assert run(pool, tmp_path, "--neighbors", "2") == 2
    assert "--neighbors must be 5, as in" in capsys.readouterr().err
    np.save(tmp_path / "other.npy", ((Y + 1) % 7).numpy())
    other = str(tmp_path / "other.npy")
    assert run([pool[0], "--labels", other, *pool[3:]], tmp_path) == 2
    assert "left by a run on the same pool, got one of other labels" in capsys.readouterr().err
    np.savez(tmp_path / "pool.npz", x=-X.numpy(), y=Y.numpy(), s=S.numpy())
    assert run(pool, tmp_path) == 2
    said = "must be as the sweep began it, got other values in rows 0 to 130; restore it, or start"
    assert said in capsys.readouterr().err
    assert run(pool, tmp_path, "--no-resume") == 0
    assert_bitwise(table(tmp_path), dict(distribution_features(-X, Y, S)))


def test_a_row_that_changes_between_two_runs_is_noticed(pool, tmp_path, monkeypatch, capsys):
    """A changed row is noticed even if the file has the same size and time; a copy is accepted."""
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(7, signal.SIGTERM)[0])
        assert run(pool, tmp_path, "--chunk", "40") == 130
    file = tmp_path / "pool.npz"
    times = file.stat()
    for row in (0, 57, 130):
        changed = X.clone()
        changed[row, 5] += 1
        np.savez(file, x=changed.numpy(), y=Y.numpy(), s=S.numpy())
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert file.stat().st_size == times.st_size
        assert run(pool, tmp_path, "--chunk", "40") == 2
        first = row // 40 * 40
        said = f"got other values in rows {first} to {min(first + 39, 130)}; restore it, or start"
        assert said in capsys.readouterr().err
    np.savez(file, x=X.numpy(), y=Y.numpy(), s=S.numpy())
    assert run(pool, tmp_path, "--chunk", "40") == 0
    assert_bitwise(table(tmp_path), dict(distribution_features(X, Y, S, chunk=40)))


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("done", [1, 5, 15])
def test_a_file_that_changes_while_it_is_read(suffix, done, pool, tmp_path, monkeypatch, capsys):
    """A truncated file is an error (reading a mapped one would kill the process), and rows changed
    while the sweep runs are noticed."""
    file = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(file, X.numpy())
    else:
        save_file({"x": X}, file)
    content = file.read_bytes()
    whole = DistributionSweep.run

    def change_after(data):
        def run(self):
            for units in whole(self):
                if units == done:
                    with file.open("r+b") as stream:
                        stream.truncate(len(data))
                        stream.write(data)
                    os.utime(file, ns=(1, 1))
                yield units

        monkeypatch.setattr(DistributionSweep, "run", run)

    arguments = ([str(file), *pool[1:]], tmp_path, "--chunk", "40")
    change_after(content[:500])
    assert run(*arguments) == 2
    said = f"features: FILE {file} must be whole while it is read, got 500 of {len(content)} bytes;"
    assert said in capsys.readouterr().err
    file.write_bytes(content)
    change_after(content[:-8] + bytes(8))
    assert run(*arguments) == (0 if done == 1 else 2)
    if done > 1:
        assert "got other values in rows 120 to 130; restore it" in capsys.readouterr().err
    file.write_bytes(content)
    change_after(content)
    assert run(*arguments) == 0
    assert_bitwise(table(tmp_path), dict(distribution_features(X, Y, S, chunk=40)))


def test_a_damaged_partial_file_is_refused(pool, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(7, signal.SIGINT)[0])
        assert run(pool, tmp_path, "--chunk", "40") == 130
    partial = tmp_path / "table.safetensors.partial"
    with safe_open(partial, framework="pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for damaged, said in (
        ({**state, "progress": torch.tensor([10**6, 40])}, "as it was saved, got data of another"),
        ({**state, "cosines": state["cosines"] + 1}, "as it was saved, got data of another"),
        ({**state, "pool/digests": state["pool/digests"] * 0}, "as it was saved, got data of"),
    ):
        save_file(damaged, partial, metadata)
        assert run(pool, tmp_path, "--chunk", "40") == 2
        assert f"file {str(partial)!r} must be {said}" in capsys.readouterr().err
    save_file(state, partial, {"format": "mts_fast.DistributionSweep/1"})
    assert run(pool, tmp_path, "--chunk", "40") == 2
    assert "of format mts_fast.DistributionSweep/2, got mts_fast" in capsys.readouterr().err
    partial.unlink()
    partial.mkdir()
    assert run(pool, tmp_path, "--chunk", "40") == 2
    assert "must be a file, got a folder or a device; name another" in capsys.readouterr().err
    assert not (tmp_path / "table.safetensors").exists()


def test_interrupted_in_the_last_stretch(pool, tmp_path, monkeypatch, capsys):
    """The finished sweep is saved before the columns are made."""
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "columns", lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert run(pool, tmp_path, "--chunk", "40") == 130
    assert "interrupted at 18 of 18; the same command goes on" in capsys.readouterr().err
    patched, seen = signalled(99, signal.SIGINT)
    monkeypatch.setattr(DistributionSweep, "run", patched)
    assert run(pool, tmp_path, "--chunk", "40") == 0
    assert seen == []
    assert_bitwise(table(tmp_path), dict(distribution_features(X, Y, S, chunk=40)))


def test_a_disk_without_room_for_the_progress(pool, tmp_path, monkeypatch, capsys):
    """A failed save of the progress is reported, and the sweep continues."""
    monkeypatch.setattr("mts_fast.cli.features.SAVE_SECONDS", 0.0)

    def full(op, path, *_):
        raise OSError(f"{op}: path must be writable, got {str(path)!r}")

    with monkeypatch.context() as patch:
        patch.setattr("mts_fast.cli.features.save_tensors", full)
        assert run(pool, tmp_path) == 0
    assert capsys.readouterr().err.count("the progress is not saved: path must be writable") == 4
    assert_bitwise(table(tmp_path), dict(distribution_features(X, Y, S)))


def test_partial_file_says_what_it_is(pool, tmp_path, monkeypatch):
    monkeypatch.setattr("mts_fast.cli.features.SAVE_SECONDS", 0.0)
    saved = []

    def keep(self):
        with safe_open(self.path, framework="pt") as file:
            saved.append((file.metadata()["format"], file.get_tensor("progress").tolist()))
        self.path.unlink()

    monkeypatch.setattr("mts_fast.cli.features._Progress.remove", keep)
    assert run(pool, tmp_path, "--chunk", "60") == 0
    assert saved == [("mts_fast.DistributionSweep/2", [12, 60])]
