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

from mts_fast._files import locked
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


def test_a_row_that_changes_between_two_runs_is_noticed(pool, tmp_path, monkeypatch, capsys):
    """Every row, even where size and time of the file are as they were; a copy is as good."""
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
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S, chunk=40))


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("done", [1, 5, 15])
def test_a_file_that_changes_while_it_is_read(suffix, done, pool, tmp_path, monkeypatch, capsys):
    """Cut off, a mapped file would kill the process; the rows after the change are compared."""
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
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S, chunk=40))


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
    """While another process has the folder the table is not read; then it is, as it has become."""
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


def test_interrupted_in_the_last_stretch(pool, tmp_path, monkeypatch, capsys):
    """The finished sweep is on disk before the columns are made."""
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "columns", lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert run(pool, tmp_path, "--chunk", "40") == 130
    assert "interrupted at 18 of 18; the same command goes on" in capsys.readouterr().err
    patched, seen = signalled(99, signal.SIGINT)
    monkeypatch.setattr(DistributionSweep, "run", patched)
    assert run(pool, tmp_path, "--chunk", "40") == 0
    assert seen == []
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S, chunk=40))


def test_what_a_killed_process_left_is_removed(pool, tmp_path):
    """Of two old folders the one goes whose process is gone."""
    dead, alive, new = (tmp_path / f".mts_fast-{name}" for name in ("dead", "alive", "new"))
    for folder in (dead, alive, new):
        folder.mkdir()
        (folder / "table.safetensors").touch()
    for folder in (dead, alive):
        os.utime(folder, (0, 0))
    with locked(alive):
        assert run(pool, tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".mts_fast-alive", ".mts_fast-new"]


def test_a_disk_without_room_for_the_progress(pool, tmp_path, monkeypatch, capsys):
    """It is said, and the sweep goes on."""
    monkeypatch.setattr("mts_fast.cli.features.SAVE_SECONDS", 0.0)

    def full(op, path, *_):
        raise OSError(f"{op}: path must be writable, got {str(path)!r}")

    with monkeypatch.context() as patch:
        patch.setattr("mts_fast.cli.features.save_tensors", full)
        assert run(pool, tmp_path) == 0
    assert capsys.readouterr().err.count("the progress is not saved: path must be writable") == 4
    assert_bitwise(table(tmp_path), distribution_features(X, Y, S))


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
    assert kept == [("mts_fast.DistributionSweep/2", [12, 60])]
