"""Choose the options of every arm on the tuning seeds, with the same number of trials for each.

    python benchmarks/evidence/tune.py --data coloured-digits

Three rounds: all trials on two seeds, the best quarter on four more, the best two on six more. All
scores are in benchmarks/results/evidence/DATA/tuning.json, from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.progress import track

from mts_fast.demo.arms import ARMS
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import DATA, make_scenario
from mts_fast.demo.training import SETTINGS, accuracy

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"
# seeds of each round, and how many trials go on to the next
ROUNDS = ((range(0, 2), 6), (range(2, 6), 2), (range(6, 12), 1))

SHARES = {"clean_share": (0.25, 0.5, 0.75)}
RATES = {"lr": (0.01, 0.02, 0.05, 0.1), "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3, 1e-2, 2e-2)}
FILTER = {**SHARES, "power": (0.5, 1, 2, 4), "balanced": (False, True)}
# 24 trials each
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "everything alike": RATES,
    "real + validation": {**SHARES, "lr": (0.02, 0.05), "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3)},
    "validation alone": RATES,
    "everything + validation": {
        **SHARES,
        "lr": (0.02, 0.05),
        "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3),
    },
    "last layer on validation": RATES,
    "small loss": {**SHARES, "keep": (0.3, 0.5, 0.7, 0.9), "balanced": (False, True)},
    "filter by validation": {
        **SHARES,
        "power": (0.5, 1, 2),
        "balanced": (False, True),
        "hard": (False,),
    },
    "filter by real + validation": FILTER,
    "filter twice": FILTER,
    "reducible holdout loss": {
        **SHARES,
        "scale": (0.5, 1, 2, 4),
        "holdout": ("real", "validation"),
    },
    "likely if clean, not easy": {
        "clean_share": (0.25, 0.5),
        "power": (0.5, 1, 2),
        "easy_power": (1, 2),
        "balanced": (False, True),
    },
    "just train twice": {**SHARES, "factor": (5, 20, 100, 1000), "identification": (0.1, 1.0)},
    "confident learning": {
        **SHARES,
        "hard": (False, True),
        "holdout": ("real", "validation"),
        "balanced": (False, True),
    },
    "loss-only selector": {
        **SHARES,
        "selector_lr": (1e-3, 4e-3),
        "power": (1, 2),
        "balanced": (False, True),
    },
    "group DRO, true groups": {
        "group_lr": (0.001, 0.01, 0.1),
        "lr": (0.02, 0.05),
        "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3),
    },
    "oracle": {**SHARES, "lr": (0.02, 0.05), "weight_decay": (1e-4, 5e-4, 2e-3, 5e-3)},
    "MTS weights": {
        **SHARES,
        "easy_power": (0, 1),
        "embeddings": ("pixels", "validation"),
        "balanced": (False, True),
    },
}
# hard filters have no power
EXTRA: dict[str, list[dict[str, Any]]] = {
    name: [
        {"clean_share": s, "hard": True, "balanced": b}
        for s in SHARES["clean_share"]
        for b in (False, True)
    ]
    for name in ("filter by validation",)
}


class Task(NamedTuple):
    """Trials of one arm on one seed."""

    arm: str
    seed: int
    trials: list[dict[str, Any]]


def trials(arm: str) -> list[dict[str, Any]]:
    """All options of an arm."""
    grid = GRIDS[arm]
    return [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ] + EXTRA.get(arm, [])


def score(data: str, task: Task) -> list[float]:
    """Test accuracy in percent of the trials of a task."""
    torch.set_num_threads(1)
    scenario = make_scenario(data, task.seed)
    run = SeedRun(scenario, SETTINGS[data], task.seed, lambda _: None)
    models = [ARMS[task.arm].train(run, options).model for options in task.trials]
    return [round(100 * accuracy(model, scenario.test), 2) for model in models]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, choices=DATA)
    parser.add_argument("--arms", nargs="*", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    path = RESULTS / arguments.data / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {}
    # arm -> trial -> seed -> accuracy
    scores = record.setdefault("scores", {})
    left = {arm: trials(arm) for arm in arguments.arms}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for seeds, keep in ROUNDS:
            tasks = []
            for seed, (arm, options) in itertools.product(seeds, left.items()):
                done = scores.setdefault(arm, {})
                new = [o for o in options if str(seed) not in done.setdefault(json.dumps(o), {})]
                if new:
                    tasks.append(Task(arm, seed, new))
            running = {pool.submit(score, arguments.data, task): task for task in tasks}
            for future in track(as_completed(running), f"{len(seeds)} seeds", len(running)):
                task = running[future]
                for options, value in zip(task.trials, future.result(), strict=True):
                    scores[task.arm][json.dumps(options)][str(task.seed)] = value
                path.write_text(json.dumps(record, indent=1) + "\n")
            for arm, options in left.items():
                means = {json.dumps(o): mean(scores[arm][json.dumps(o)].values()) for o in options}
                left[arm] = sorted(options, key=lambda o, m=means: -m[json.dumps(o)])[:keep]
    record["chosen"] = record.get("chosen", {}) | {arm: o[0] for arm, o in left.items()}
    path.write_text(json.dumps(record, indent=1) + "\n")
    for arm, options in record["chosen"].items():
        print(f"{arm:28s} {mean(scores[arm][json.dumps(options)].values()):.1f}  {options}")


if __name__ == "__main__":
    main()
