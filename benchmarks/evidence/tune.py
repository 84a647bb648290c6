"""Choose the options of every arm on the tuning seeds, with the same number of trials for each.

    python benchmarks/evidence/tune.py --data coloured-digits

Two rounds: all trials on two seeds, the best three on four more. All
scores are in benchmarks/results/evidence/DATA/tuning.json, from which an interrupted run goes on.
The best become the options of the demo.
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

from mts_fast import demo
from mts_fast.demo.arms import ARMS
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import DATA, make_scenario
from mts_fast.demo.jobs import available_arms
from mts_fast.demo.training import SETTINGS, accuracy

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"
OPTIONS = Path(demo.__file__).with_name("options.json")
# seeds of each round, and how many trials go on to the next
ROUNDS = ((range(0, 2), 3), (range(2, 6), 1))

SHARES = {"clean_share": (0.25, 0.5, 0.75)}
DECAYS = {"weight_decay": (5e-4, 2e-3, 5e-3, 1e-2)}
RATES = {"lr": (0.02, 0.05, 0.1), **DECAYS}
FILTER = {**SHARES, "balanced": (True,), "power": (0.5, 1, 2, 4)}
# 12 trials each
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "everything alike": RATES,
    "real + validation": {**SHARES, **DECAYS},
    "validation alone": RATES,
    "everything + validation": {**SHARES, **DECAYS},
    "last layer on validation": RATES,
    "small loss": {**SHARES, "balanced": (True,), "keep": (0.3, 0.5, 0.7, 0.9)},
    # power 0: the class that the classifier takes
    "filter by validation": {**SHARES, "balanced": (True,), "power": (0, 0.5, 1, 2)},
    "filter by real + validation": FILTER,
    "filter twice": FILTER,
    "reducible holdout loss": {
        **{"clean_share": (0.25, 0.5), "balanced": (True,)},
        **{"scale": (0.5, 1, 2), "holdout": ("real", "validation")},
    },
    "likely if clean, not easy": {
        **{"clean_share": (0.25, 0.5), "balanced": (True,)},
        **{"power": (0, 0.5, 1), "easy_power": (2, 4)},
    },
    "just train twice": {**SHARES, "balanced": (True,), "factor": (5, 20, 100, 1000)},
    "confident learning": {
        **{**SHARES, "balanced": (True,)},
        "filter_by": ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning"),
    },
    "loss-only selector": {
        **{**SHARES, "balanced": (True,)},
        **{"selector_lr": (1e-3, 4e-3), "power": (1, 2)},
    },
    "group DRO, true groups": {"group_lr": (0.001, 0.01, 0.1), **DECAYS},
    "oracle": {**SHARES, **DECAYS},
    "MTS weights": {
        **{"clean_share": (0.25, 0.5), "balanced": (True,)},
        **{"easy_power": (0, 2, 4), "refinements": (0, 4)},
    },
    "the recipe without MTS": {
        **{"clean_share": (0.25, 0.5), "balanced": (True,), "power": (0.5,)},
        **{"easy_power": (0, 2, 4), "refinements": (0, 4)},
    },
}


class Task(NamedTuple):
    """Trials of one arm on one seed."""

    arm: str
    seed: int
    trials: list[dict[str, Any]]


def trials(arm: str) -> list[dict[str, Any]]:
    """All options of an arm."""
    grid = GRIDS[arm]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def score(data: str, task: Task) -> list[float]:
    """Test accuracy in percent of the trials of a task."""
    torch.set_num_threads(1)
    scenario = make_scenario(data, task.seed)
    run = SeedRun(scenario, SETTINGS[data], task.seed)
    models = [ARMS[task.arm].train(run, options).model for options in task.trials]
    return [round(100 * accuracy(model, scenario.test), 2) for model in models]


def average(scores: dict[str, dict[str, float]], options: dict[str, Any], seeds: range) -> float:
    """Mean accuracy of a trial over the seeds up to the last of a round: alike for all of them."""
    return mean(scores[json.dumps(options)][str(seed)] for seed in range(seeds.stop))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, choices=DATA)
    parser.add_argument("--arms", nargs="*", choices=list(GRIDS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    path = RESULTS / arguments.data / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {}
    # arm -> trial -> seed -> accuracy
    scores = record.setdefault("scores", {})
    available = [arm for arm in available_arms(arguments.data) if arm in GRIDS]
    left = {arm: trials(arm) for arm in arguments.arms or available}
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
                of_arm = scores[arm]
                left[arm] = sorted(options, key=lambda o, s=of_arm: -average(s, o, seeds))[:keep]
    record["chosen"] = record.get("chosen", {}) | {arm: o[0] for arm, o in left.items()}
    path.write_text(json.dumps(record, indent=1) + "\n")
    options = json.loads(OPTIONS.read_text())
    options[arguments.data] = record["chosen"]
    OPTIONS.write_text(json.dumps(options, indent=1) + "\n")
    for arm, options in record["chosen"].items():
        print(f"{arm:28s} {average(scores[arm], options, ROUNDS[-1][0]):.1f}  {options}")


if __name__ == "__main__":
    main()
