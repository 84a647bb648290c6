"""`mts-fast bench`: one benchmark again, its ratios beside the committed ones."""

import json
from pathlib import Path

import pytest

from mts_fast.cli.bench import comparison, ratios_of
from mts_fast.cli.main import main

ROOT = Path(__file__).parents[2]
MACHINE = {"command": "", "machine": "a machine"}

BENCH = """
import pytest, time

@pytest.mark.parametrize("size", [3])
def bench_tiny(benchmark, size):
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info["ratios"] = {"ours": 1.0, "theirs": 4.0}
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one benchmark, whose committed ratio of "theirs" is 2."""
    for name in ("cpu", "results", "tables"):
        (tmp_path / "benchmarks" / name).mkdir(parents=True)
    (tmp_path / "benchmarks" / "cpu" / "bench_tiny.py").write_text(BENCH)
    (tmp_path / "benchmarks" / "cpu" / "bench_without_record.py").write_text(BENCH)
    ini = "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n"
    (tmp_path / "pytest.ini").write_text(ini)
    condense = (ROOT / "benchmarks" / "tables" / "condense.py").read_text()
    (tmp_path / "benchmarks" / "tables" / "condense.py").write_text(condense)
    row = {"name": "bench_tiny[3]", "group": None, "ratios": {"ours": 1.0, "theirs": 2.0}}
    record = json.dumps(MACHINE | {"rows": [row]})
    (tmp_path / "benchmarks" / "results" / "tiny.json").write_text(record)
    return tmp_path


def test_a_benchmark_is_run_and_compared(checkout, monkeypatch, capfd):
    # a benchmark does not run in a process of pytest-xdist
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert main(["bench", "tiny", "--checkout", str(checkout)]) == 0
    printed = capfd.readouterr().out
    assert "tiny[3]  ours         1.00    1.00       1.00\n" in printed
    assert "tiny[3]  theirs       2.00    4.00       2.00 *\n" in printed
    assert "2 ratios, 1 more than 15 % apart (*)" in printed


def test_a_benchmark_that_fails_is_told(checkout, capfd):
    path = checkout / "benchmarks" / "cpu" / "bench_tiny.py"
    path.write_text("raise RuntimeError('no such kernel')")
    assert main(["bench", "tiny", "--checkout", str(checkout)]) == 2
    assert "tiny must be a benchmark that runs, got exit status" in capfd.readouterr().err


def test_the_names_are_listed(checkout, capsys):
    assert main(["bench", "--checkout", str(checkout)]) == 0
    assert capsys.readouterr().out == "tiny\n"
    assert main(["bench"]) == 0
    assert "step" in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fast"], "NAME must be one of tiny, got 'fast'; `mts-fast bench` lists them"),
        (["../x"], "NAME must be one of tiny"),
        (["tiny", "--checkout", "nowhere"], "--checkout must be a checkout of mts_fast"),
    ],
)
def test_what_is_wrong_is_named(words, expected, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    words = words if "--checkout" in words else [*words, "--checkout", "."]
    assert main(["bench", *words]) == 2
    assert expected in capsys.readouterr().err


def test_every_committed_record_has_ratios():
    """Of every kind of benchmark; those of one group over its first."""
    for path in (ROOT / "benchmarks" / "cpu").glob("bench_*.py"):
        record = ROOT / "benchmarks" / "results" / f"{path.stem.removeprefix('bench_')}.json"
        if record.exists():
            assert len(ratios_of(json.loads(record.read_text()))) > 1, record
    grouped = [
        {"name": "bench_x[a]", "group": "g", "median_us": 4.0},
        {"name": "bench_x[b]", "group": "g", "median_us": 2.0},
    ]
    assert list(ratios_of({"rows": grouped}).values()) == [1.0, 0.5]


def test_what_only_one_record_has_is_left_out():
    old = MACHINE | {"rows": [{"name": "bench_x", "group": None, "rows": {"a": {"time": 2.0}}}]}
    new = {"rows": [{"name": "bench_x", "group": None, "rows": {"b": {"time": 2.0}}}]}
    assert "0 ratios, 0 more than" in comparison(old, MACHINE | new)
