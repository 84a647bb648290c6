"""`mts-fast bench`: runs a committed benchmark again, and compares its ratios with the record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mts_fast
from mts_fast._check import fail

OP = "bench"
# of a ratio over the committed one, from which a line is marked
APART = 1.15

Ratios = dict[tuple[str, str], float]


def run_bench(noun: str | None, checkout: str | None) -> int:
    """Run one benchmark, print a line for each of its ratios, and return the exit status: that of
    the benchmark. Without a noun, list those that can be run."""
    root = _checkout(checkout)
    known = sorted(
        path.stem.removeprefix("bench_")
        for path in (root / "benchmarks" / "cpu").glob("bench_*.py")
        if _record(root, path.stem.removeprefix("bench_")).exists()
    )
    if noun is None:
        print("\n".join(known))
        return 0
    if noun not in known:
        hint = "`mts-fast bench` lists them"
        fail(ValueError, OP, "NAME", f"one of {', '.join(known)}", repr(noun), hint)
    committed = json.loads(_record(root, noun).read_text())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = (f"benchmarks/cpu/bench_{noun}.py", "--benchmark-only", "-p", "no:cacheprovider")
        # the benchmarks measure this package, wherever the checkout is
        package = str(Path(mts_fast.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, f"--benchmark-json={report}"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        )
        if not report.exists() or not report.stat().st_size:
            expected, got = "a benchmark that runs", f"exit status {done.returncode}"
            fail(RuntimeError, OP, noun, expected, got, "see its output above")
        condense = root / "benchmarks" / "tables" / "condense.py"
        command = [sys.executable, str(condense), str(report), folder, f"mts-fast bench {noun}"]
        subprocess.run(command, check=True)
        here = json.loads((Path(folder) / f"{noun}.json").read_text())
    print(comparison(committed, here))
    return done.returncode


def comparison(committed: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Each ratio of both records, and here over committed; what one of them lacks is left out."""
    before, after = ratios_of(committed), ratios_of(here)
    lines = [f"committed: {committed['machine']}", f"here:      {here['machine']}", ""]
    width = max((len(f"{name}  {arm}") for name, arm in after), default=0)
    lines.append(f"{'':<{width}}  committed    here  here / committed")
    apart = shared = 0
    for (name, arm), value in after.items():
        old = before.get((name, arm))
        if old is None:
            continue
        shared += 1
        change = value / old
        marked = not 1 / APART < change < APART
        apart += marked
        label = f"{name}  {arm}"
        cells = f"{old:>9.2f} {value:>7.2f} {change:>10.2f}"
        lines.append(f"{label:<{width}}  {cells}{' *' if marked else ''}")
    share = round(100 * (APART - 1))
    lines.append(f"{shared} ratios, {apart} more than {share} % apart (*)")
    return "\n".join(lines)


def ratios_of(record: Mapping[str, Any]) -> Ratios:
    """(benchmark, implementation) -> time over that of the first implementation.

    Ratios travel from one machine to another, times do not: benchmarks that record times alone are
    compared within their group.
    """
    ratios: Ratios = {}
    first: dict[str, float] = {}
    for row in record["rows"]:
        name = row["name"].removeprefix("bench_")
        if "ratios" in row:
            ratios |= {(name, arm): float(value) for arm, value in row["ratios"].items()}
        elif "rows" in row:
            ratios |= {(name, arm): float(v["time"]) for arm, v in row["rows"].items()}
        elif row["group"] is not None:
            base = first.setdefault(row["group"], row["median_us"])
            ratios[name, f"over the first of {row['group']}"] = row["median_us"] / base
        else:
            ratios |= {
                (name, key): float(value) for key, value in row.items() if key.startswith("time ")
            }
    return ratios


def _record(root: Path, noun: str) -> Path:
    return root / "benchmarks" / "results" / f"{noun}.json"


def _checkout(folder: str | None) -> Path:
    """The checkout that has the benchmarks: wheels leave them out."""
    around = Path(mts_fast.__file__).parents[1]
    for root in [Path(folder)] if folder is not None else [around, Path.cwd()]:
        if (root / "benchmarks" / "cpu").is_dir():
            return root
    hint = "run it there, or pass --checkout FOLDER"
    got = repr(folder) if folder is not None else f"neither {around} nor {Path.cwd()}"
    fail(ValueError, OP, "--checkout", "a checkout of mts_fast with its benchmarks", got, hint)
