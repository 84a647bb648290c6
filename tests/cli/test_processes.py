"""The command as a process: signals, killed processes, closed pipes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rank_pool import SLOW

import mts_fast
from mts_fast._process import TolerantStream, interrupts, postponed
from mts_fast.cli.main import main
from mts_fast.demo import run as demo_run
from mts_fast.demo.jobs import Job, available_arms, train_job
from mts_fast.demo.tables import print_table
from mts_fast.demo.workers import run_tasks

# seconds to wait for a process; each ends within one
PATIENCE = 60

# the demo with seeds that never end, or fail; each worker writes its process id when it starts
DEMO = """
import os, signal, sys, time
from pathlib import Path
from mts_fast.cli import main
from mts_fast.demo import run
from mts_fast.demo.workers import run_tasks

def work(seed):
    Path(f"{seed}.part").write_text(str(os.getpid()))
    os.replace(f"{seed}.part", f"{seed}.pid")
    if "fail" in sys.argv and seed == 1:
        while not Path("0.pid").exists():
            time.sleep(0.01)
        raise ValueError("demo: seed 1 must be good, got a bad one; take another")
    time.sleep(1000)

def demo(*_):
    ended = lambda seed, well: print(seed, well, flush=True)
    return run_tasks(work, range(2), lambda *_: None, ended)

if __name__ == "__main__":
    # as from a terminal, also where the tests run under nohup or in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.cpu_count = lambda: 2
    run.run_demo = demo
    sys.exit(main.main(["demo"]))
"""


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def is_gone(pid):
    """Whether the process has ended; a zombie counts as ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def demo(tmp_path):
    """Starts DEMO; returns its process and its workers' process ids once both have started."""
    (tmp_path / "script.py").write_text(DEMO)
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "script.py", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        files = [tmp_path / f"{seed}.pid" for seed in range(2)]
        wait_for(lambda: process.poll() is not None or all(f.exists() for f in files))
        return process, [int(f.read_text()) for f in files]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


# the signal goes to the main process alone, or to the whole group as a terminal sends it
@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGTERM, False, marks=SLOW),
        (signal.SIGINT, True),
        pytest.param(signal.SIGHUP, True, marks=SLOW),
    ],
)
def test_an_interrupted_demo_leaves_no_process(number, to_all, demo):
    process, workers = demo()
    if to_all:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "mts-fast demo: interrupted\n")
    wait_for(lambda: all(is_gone(pid) for pid in workers))


def test_workers_die_with_the_main_process(demo):
    process, workers = demo()
    process.kill()
    wait_for(lambda: all(is_gone(pid) for pid in workers))


def test_a_killed_worker(demo):
    process, workers = demo()
    os.kill(workers[1], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    said = "mts-fast demo: every process must be alive until its work is done, got one that was"
    assert err.startswith(said) and err.count("\n") == 1
    wait_for(lambda: all(is_gone(pid) for pid in workers))


def test_a_failed_seed_ends_the_others_and_is_not_done(demo):
    process, workers = demo("fail")
    out, err = process.communicate(timeout=PATIENCE)
    said = "mts-fast demo: seed 1 must be good, got a bad one; take another\n"
    assert (process.returncode, out, err) == (2, "1 False\n", said)
    wait_for(lambda: all(is_gone(pid) for pid in workers))


def test_results_of_seeds_are_in_order():
    ended = []
    results = run_tasks(str, [7, 3], lambda *_: None, lambda *what: ended.append(what))
    assert results == ["7", "3"]
    assert sorted(ended) == [(3, True), (7, True)]


START = """
import os, signal, sys
module, number = sys.argv[1:]
class Sender:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Sender())
from mts_fast_command import main
sys.argv[1:] = ["doctor"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("torch", signal.SIGINT),
        ("mts_fast.features", signal.SIGTERM),
        ("mts_fast.cli.main", signal.SIGINT),
    ],
)
def test_interrupted_while_it_is_imported(module, number):
    command = [sys.executable, "-c", START, module, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    said = "mts-fast: interrupted while it started; nothing was changed\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


def test_version():
    command = [sys.executable, "-m", "mts_fast_command", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"mts-fast {mts_fast.__version__}\n"


def test_signals_that_are_ignored_stay_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts(), postponed() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert requests == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def raising(error):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 3 TiB"), "memory must be enough, got Unable to allocate"),
        (MemoryError(), "memory must be enough, got none left; close other programs"),
        (
            RuntimeError("[enforce fail]\nDefaultCPUAllocator: can't allocate memory: you tried"),
            "memory must be enough, got [enforce fail] DefaultCPUAllocator: can't allocate memory",
        ),
        (RuntimeError("op: no\nkernel"), "op: no kernel; `mts-fast -v doctor` shows where, `mts-"),
        (
            RuntimeError("op: no kernel; use backend 'auto' or 'reference'"),
            "op: no kernel; set MTS_FAST_BACKEND to 'auto' or 'reference'\n",
        ),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"),
            "No module named 'sklearn'; pip install 'mts_fast[demo]'\n",
        ),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'\n"),
        (KeyboardInterrupt(), "interrupted\n"),
    ],
)
def test_errors_are_one_line(error, said, monkeypatch, capsys):
    monkeypatch.setattr("mts_fast.cli.doctor.report", raising(error))
    assert main(["doctor"]) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    printed = capsys.readouterr().err
    assert printed.startswith(f"mts-fast doctor: {said}") and printed.count("\n") == 1


def closed_pipe(encoding="utf-8"):
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding=encoding)


def test_a_reader_that_goes_away_is_no_error(monkeypatch, capsys):
    with closed_pipe() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["doctor"]) == 0
    assert capsys.readouterr().err == ""


def test_output_that_cannot_be_written_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["doctor"]) == 2
    said = "mts-fast doctor: standard output must be writable, got [Errno 28] No space left on"
    assert capsys.readouterr().err.startswith(said)


def test_characters_that_an_encoding_lacks_are_escaped(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        stream = TolerantStream(file)
        assert stream.write("a ± \udcff") == 5
    assert (tmp_path / "out").read_text() == "a \\xb1 \\udcff"


@pytest.fixture(scope="module")
def result():
    data = "coloured-digits"
    job = Job(data, 400, available_arms(data), settings={"steps": 5})
    return train_job(job, lambda _: None)


PICTURES = [
    *("accuracies.png", "extremes.png", "training_curves.png", "weights_by_kind.png"),
    "weights_over_time.png",
]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_demo_keeps_results_that_nobody_reads(encoding, result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "run_jobs", lambda *_: [result])
    with closed_pipe(encoding) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["demo", "--seeds", "1", "--out", str(tmp_path / "new" / "demo")]) == 0
    assert capsys.readouterr().err == ""
    out = tmp_path / "new" / "demo"
    assert sorted(p.name for p in out.iterdir()) == sorted(["results.json", *PICTURES])
    record = json.loads((out / "results.json").read_text())
    assert record["runs"][0]["accuracy"] == result.accuracy


def test_the_demos_table_in_ascii_and_in_twenty_columns(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "run_jobs", lambda *_: [result])
    monkeypatch.setenv("COLUMNS", "20")
    with open(tmp_path / "printed", "w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["demo", "--seeds", "1", "--out", str(tmp_path)]) == 0
    printed = (tmp_path / "printed").read_text()
    assert max(len(line) for line in printed.splitlines()) <= 20
    for arm, accuracy in result.accuracy.items():
        assert f"    {100 * accuracy:.1f}\n" in printed
        if arm in result.auc:
            assert f"    {result.auc[arm]:.2f}\n" in printed


def test_the_demo_on_a_disk_that_fills_up(result, tmp_path, monkeypatch, capsys):
    """The old results file stays, and the new results are still printed."""
    monkeypatch.setattr(demo_run, "run_jobs", lambda *_: [result])
    (tmp_path / "results.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mts_fast._files.os.replace", full)
        assert main(["demo", "--seeds", "1", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert f"{100 * result.accuracy['MTS itself']:.1f}" in out
    assert f"path must be writable, got {str(tmp_path / 'results.json')!r} ([Errno 28]" in err
    assert "the old file is unchanged" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


def test_the_demo_tries_everything_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "run_tasks", raising(AssertionError("trained")))
    file = tmp_path / "file"
    file.touch()
    for arguments, said in (
        (["--out", str(file)], f"--out must be a folder, or new, got {str(file)!r}"),
        (["--out", str(file / "in")], f"--out must be a folder, or new, got {str(file / 'in')!r}"),
        (["--out", "/proc/new"], "--out must be writable, got '/proc/new'"),
        (["--out", "/proc"], "--out must be in a writable folder, got '/proc'"),
        (["--out", ""], "--out must be a folder, got an empty name"),
        (["--root", "."], "--root must be given with data of Fashion-MNIST only, got coloured-"),
        (["--study", "gsnr", "--steps", "5"], "--steps must be left out with --study gsnr"),
        (["--study", "gsnr", "--seeds", "2"], "--seeds must be left out with --study gsnr"),
        (
            ["--study", "features", "--data", "fashion"],
            "--data must be coloured with --study features, got fashion; pass --data coloured-",
        ),
    ):
        assert main(["demo", *arguments]) == 2
        assert f"mts-fast demo: {said}" in capsys.readouterr().err
    for module in ("sklearn.metrics", "matplotlib.pyplot", "rich"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert main(["demo", "--out", str(tmp_path / "new")]) == 2
        err = capsys.readouterr().err
        assert module in err and "pip install 'mts_fast[" in err
    for flag, value, said in (
        ("--seeds", "abc", "must be a whole number from 1 to 1000, got 'abc'"),
        ("--seeds", "0", "must be a whole number from 1 to 1000, got '0'"),
        ("--steps", "1.5", "must be a whole number from 1 to 9223372036854775807, got '1.5'"),
        ("--first-seed", "1" + 20 * "0", "must be a whole number from 0 to 92233720368547748"),
        ("--first-seed", "-1", "must be a whole number from 0 to 9223372036854774807, got '-1'"),
    ):
        assert main(["demo", flag, value]) == 2
        assert f"mts-fast demo: {flag} {said}" in capsys.readouterr().err
    for words, said in (
        (["demo", "--data", "cats"], "'digits', 'fashion', got 'cats'; see"),
        (["demo", "--sedes", "3"], "options must be ones that the command has, got --sedes; did"),
        (["demo", "more"], "the command line must be as the help says, got: Got unexpected"),
        (["features", "pool.npy"], "--labels must be given, got nothing; see `mts-fast features"),
        (
            ["fit"],
            "the command must be one of bench, demo, doctor, features, recipe, report, score,"
            " select, train, tune, got 'fit'; see",
        ),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folders_of_a_demo_that_failed_go_again(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(demo_run, "run_tasks", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["demo", "--out", str(tmp_path / "there" / "a" / "b")]) == 130
    assert list((tmp_path / "there").iterdir()) == []


def test_a_table_that_fits_is_one(capsys):
    from rich.console import Console

    rows = [["one arm", "1.5 ± 0.5"], ["another", ""]]
    print_table(Console(width=30), "a title", ["trained on", "accuracy"], rows)
    assert "│ one arm    │ 1.5 ± 0.5 │" in capsys.readouterr().out
    print_table(Console(width=19), "a title", ["trained on", "accuracy"], rows)
    expected = ["a title", "one arm", "  accuracy", "    1.5 ± 0.5", "another"]
    assert capsys.readouterr().out.splitlines() == expected
