"""Choose the options of every arm on the tuning seeds, with the same number of trials for each.

    python benchmarks/evidence/tune.py --data coloured-digits

Three rounds: all trials on three seeds, the best quarter on three more, the best two on six more.
The grids and all scores are in benchmarks/results/evidence/DATA/tuning.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from mts_fast.demo.arms import ARMS
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import make_scenario
from mts_fast.demo.training import SETTINGS, accuracy

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"
# seeds of each round, and how many trials go on to the next
ROUNDS = ((range(0, 3), 6), (range(3, 6), 2), (range(6, 12), 1))

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
    "likely if clean, not easy": {**SHARES, "power": (0.5, 1, 2, 4), "easy_power": (1, 2)},
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
        "power": (1, 2),
        "embeddings": ("pixels", "validation"),
        "features": ("paper", "all"),
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


def trials(arm: str) -> list[dict[str, Any]]:
    """All options of an arm."""
    grid = GRIDS[arm]
    return [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ] + EXTRA.get(arm, [])


def score_seed(
    data: str, work: dict[str, list[dict[str, Any]]], seed: int
) -> dict[str, list[float]]:
    """Test accuracy in percent of these trials, by arm."""
    torch.set_num_threads(1)
    scenario = make_scenario(data, seed)
    run = SeedRun(scenario, SETTINGS[data], seed, lambda _: None)
    scores = {}
    for arm, options in work.items():
        start = time.perf_counter()
        scores[arm] = [
            100 * accuracy(ARMS[arm].train(run, o).model, scenario.test) for o in options
        ]
        print(seed, arm, f"{max(scores[arm]):.1f} {time.perf_counter() - start:.0f} s", flush=True)
    return scores


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--arms", nargs="*", default=list(GRIDS))
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    path = RESULTS / arguments.data / "tuning.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    left = {arm: trials(arm) for arm in arguments.arms}
    scores: dict[str, dict[str, list[float]]] = {
        arm: {json.dumps(o): [] for o in options} for arm, options in left.items()
    }
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for seeds, keep in ROUNDS:
            for result in pool.map(partial(score_seed, arguments.data, left), seeds):
                for arm, values in result.items():
                    for options, value in zip(left[arm], values, strict=True):
                        scores[arm][json.dumps(options)].append(round(value, 2))
            for arm, options in left.items():
                best = sorted(options, key=lambda o, a=arm: -mean(scores[a][json.dumps(o)]))
                left[arm] = best[:keep]
    for arm, options in left.items():
        record["arms"][arm] = {"chosen": options[0], "trials": scores[arm]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    for arm in left:
        chosen = record["arms"][arm]["chosen"]
        print(f"{arm:28s} {mean(scores[arm][json.dumps(chosen)]):.1f}  {chosen}")


if __name__ == "__main__":
    main()
