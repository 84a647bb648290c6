"""Runs MTSStep on random worlds (tests/worlds) and writes a summary of the verdicts.

    python scripts/search_worlds.py --count 2000 --seed 1     # make worlds
    python scripts/search_worlds.py --package ../other        # the same worlds by another checkout
    python scripts/search_worlds.py --replay failure.json     # one world again

Exit status 1 where a world is silently wrong, torn or ends in a raw error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "worlds.json"
# least number of worlds in 2000 that should compute each option
WANTED = 50
# options that plain autograd.grad does not differentiate: always refused, so exempt from WANTED
REFUSED = {"layer: checkpoint: reentrant"}
# worlds per process, and the most that a crash of the interpreter can cost
CHUNK = 50


def main() -> int:
    """The command."""
    arguments = _arguments()
    if arguments.work:
        return _work()
    if arguments.replay:
        return _replay(arguments)
    sys.path.insert(0, str(ROOT / "tests"))
    from worlds.sampling import sample

    worlds = [world.to_json() for world in sample(arguments.count, arguments.seed)]
    reports = _run_all(worlds, arguments.package, arguments.jobs)
    result = _summary(worlds, reports, arguments)
    before = _compared(worlds, reports, arguments)
    if before is not None:
        result["compared"] = before
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.reports:
        rows = [{"world": json.loads(w), "report": r} for w, r in zip(worlds, reports, strict=True)]
        arguments.reports.write_text(json.dumps(rows) + "\n")
    _print(result)
    lost = result.get("compared", {}).get("lost", [])
    return 1 if result["failures"] or lost else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="how many worlds")
    parser.add_argument("--seed", type=int, default=1, help="of the first world")
    parser.add_argument("--package", type=Path, default=ROOT, help="checkout whose mts_fast runs")
    parser.add_argument(
        "--against", type=Path, help="reports of another run: what it computed must be computed"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="summary, JSON")
    parser.add_argument("--reports", type=Path, help="every world and its report, JSON")
    parser.add_argument("--replay", type=Path, help="a JSON file with one world, to run alone")
    parser.add_argument("--shrink", action="store_true", help="with --replay: make it smaller")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _environment(package: Path) -> dict[str, str]:
    path = os.pathsep.join([str(package.resolve()), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _work() -> int:
    """Reads worlds from stdin, one a line, and writes their reports to stdout."""
    import torch

    torch.set_num_threads(1)
    from worlds.runner import run
    from worlds.world import World

    for line in sys.stdin:
        print(json.dumps(run(World.from_json(line)).to_dict()), flush=True)
    return 0


def _run_all(worlds: list[str], package: Path, jobs: int) -> list[dict[str, Any]]:
    from concurrent.futures import ThreadPoolExecutor

    chunks = [worlds[i : i + CHUNK] for i in range(0, len(worlds), CHUNK)]
    reports: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(lambda chunk: _run_chunk(chunk, package), chunks):
            reports += done
            print(f"\r{len(reports)} of {len(worlds)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return reports


def _run_chunk(worlds: list[str], package: Path) -> list[dict[str, Any]]:
    """Reports of the worlds, from a separate process. A crash is the verdict on the world that was
    running; a new process goes on after it."""
    reports: list[dict[str, Any]] = []
    while len(reports) < len(worlds):
        left = worlds[len(reports) :]
        done = subprocess.run(
            [sys.executable, __file__, "--work"],
            input="\n".join(left),
            env=_environment(package),
            capture_output=True,
            text=True,
        )
        reports += [json.loads(line) for line in done.stdout.splitlines()]
        if len(reports) < len(worlds):
            last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            reports.append(
                {
                    "verdict": "crash",
                    "engines": [],
                    "reason": last[0],
                    "faults": [],
                    "call": 0,
                    "noise": False,
                }
            )
    return reports


def _summary(
    worlds: list[str], reports: list[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    from worlds.world import World

    verdicts = Counter(r["verdict"] for r in reports)
    computed = [w for w, r in zip(worlds, reports, strict=True) if r["verdict"] == "computed"]
    engines = Counter(
        r["engines"][-1] for r in reports if r["verdict"] == "computed" and r["engines"]
    )
    options: Counter[str] = Counter()
    for world in worlds:
        options.update(dict.fromkeys(World.from_json(world).options(), 0))
    for world in computed:
        options.update(World.from_json(world).options())
    failures = [
        {"kind": signature(r), "report": r, "world": json.loads(w)}
        for w, r in zip(worlds, reports, strict=True)
        if r["verdict"] not in ("computed", "refused")
    ]
    return {
        "count": len(worlds),
        "seed": arguments.seed,
        "verdicts": dict(verdicts.most_common()),
        "engines": dict(engines.most_common()),
        # computed worlds in which rounding may be as large as the dots, which then prove nothing
        "dots are noise": sum(r["noise"] for r in reports if r["verdict"] == "computed"),
        "refusals": dict(
            Counter(reason(r) for r in reports if r["verdict"] == "refused").most_common()
        ),
        "kinds": dict(Counter(f["kind"] for f in failures).most_common()),
        "rare options": {
            n: k
            for n, k in sorted(options.items())
            if k * 2000 < WANTED * len(worlds) and n not in REFUSED
        },
        "options": dict(sorted(options.items())),
        "failures": failures,
    }


def reason(report: dict[str, Any]) -> str:
    """The kind of a refusal, without names and numbers; the last engine's where several refused."""
    text = re.sub(r"^\w+: MTSStep: ", "", report["reason"]).rpartition(" finite_difference: ")[2]
    text = re.sub(r"^engine must be able to serve the model, got ('\w+');", r"engine=\1:", text)
    text = re.sub(r"(\w+\.)+\w+( is used|: )", r"a layer\2", text)
    text = re.sub(r"\d[\d.e+-]*", "N", text)
    return re.split(r" \(|; ", text)[0][:100]


def signature(report: dict[str, Any]) -> str:
    """The kind of a failure."""
    what = report["faults"][0].split(":")[0] if report["faults"] else report["reason"][:80]
    engine = report["engines"][-1] if report["engines"] else "none"
    return f"{report['verdict']} | {what} | {engine}"


def _compared(
    worlds: list[str], reports: list[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any] | None:
    if arguments.against is None:
        return None
    rows = json.loads(arguments.against.read_text())
    other_reports = {json.dumps(row["world"]): row["report"] for row in rows}
    lost, noise, shared = [], [], 0
    for world, report in zip(worlds, reports, strict=True):
        other = other_reports.get(world)
        if other is None or other["verdict"] != "computed":
            continue
        shared += 1
        if report["verdict"] != "computed":
            # where the other run's dots are noise, nothing says whether they were right
            (noise if other["noise"] else lost).append(
                {"report": report, "world": json.loads(world)}
            )
    return {"computed there": shared, "lost": lost, "noise there": noise}


def _replay(arguments: argparse.Namespace) -> int:
    sys.path[:0] = [str(arguments.package.resolve()), str(ROOT / "tests")]
    from worlds.runner import FAILURES, run
    from worlds.shrinking import shrunk
    from worlds.world import World

    record = json.loads(arguments.replay.read_text())
    world = World(**record.get("world", record))
    report = run(world)
    if arguments.shrink and report.verdict in FAILURES:
        world = shrunk(world)
        report = run(world)
    print(world.to_json())
    print(json.dumps(report.to_dict(), indent=1))
    return 1 if report.verdict in FAILURES else 0


def _print(result: dict[str, Any]) -> None:
    for part in ("verdicts", "engines", "refusals", "kinds"):
        print(f"{part}:")
        for name, number in result[part].items():
            print(f"  {number:5d}  {name}")
    if result["rare options"]:
        print(f"computed less than {WANTED} times in 2000:")
        for name, number in result["rare options"].items():
            print(f"  {number:5d}  {name}")
    if "compared" in result:
        compared = result["compared"]
        print(
            f"computed there: {compared['computed there']}, lost here: {len(compared['lost'])}"
            f" and {len(compared['noise there'])} whose dots are noise there"
        )


if __name__ == "__main__":
    sys.exit(main())
