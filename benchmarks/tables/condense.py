"""Condenses pytest-benchmark's report to the records that are committed, one per benchmark file.

`python benchmarks/tables/condense.py REPORT.json FOLDER [COMMAND]` writes FOLDER/<noun>.json for
every bench_<noun>.py in the report; COMMAND is the command that the record names as its source.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch


def condense(report: dict, command: str) -> dict[str, dict]:
    """Noun -> command, machine, and per benchmark its name, median, rounds and extra_info."""
    cpu = report["machine_info"]["cpu"]
    machine = f"{cpu['count']} cores {cpu.get('brand_raw', cpu['arch'])}, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    rows = defaultdict(list)
    for run in report["benchmarks"]:
        path, _, name = run["fullname"].partition("::")
        stats = run["stats"]
        rows[Path(path).stem.removeprefix("bench_")].append(
            {
                "name": name,
                "group": run["group"],
                "median_us": round(stats["median"] * 1e6, 1),
                "rounds": stats["rounds"],
                **run["extra_info"],
            }
        )
    return {
        noun: {"command": command, "machine": machine, "rows": noun_rows}
        for noun, noun_rows in rows.items()
    }


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:3])
    command = (*sys.argv[3:], "make bench")[0]
    for noun, record in condense(json.loads(source.read_text()), command).items():
        (folder / f"{noun}.json").write_text(json.dumps(record, indent=1) + "\n")
