"""`mts-fast train` and `report` on coloured digits as folders: accuracy of every arm, and seconds.

    python benchmarks/evidence/trees.py --seeds 5

Writes benchmarks/results/trees.json: accuracy of every arm by seed, and seconds of both commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from write_tree import write_tree

from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.stages import FILTER, OURS

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "trees.json"
FIRST_SEED = 400


def run(folder: Path, seed: int) -> dict[str, object]:
    """Both commands on one seed's tree."""
    write_tree("coloured-digits", seed, folder / "data")
    words = [sys.executable, "-m", "mts_fast.cli.main"]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    roles = [word for r in ("real", "synthetic", "val", "test") for word in (f"--{r}", f"data/{r}")]
    train = [*roles, "--model", "tree_model:mlp", "--config", str(HERE / "coloured_digits.toml")]
    seconds = {}
    for verb, more in (
        ("train", [*train, "--seed", str(seed), "--out", "run"]),
        ("report", ["run"]),
    ):
        began = time.perf_counter()
        subprocess.run([*words, verb, *more], cwd=folder, env=environment, check=True)
        seconds[verb] = time.perf_counter() - began
    arms = load_outcome("trees", folder / "run").arms
    accuracy = {name: 100 * figures["accuracy"] for name, figures in arms.items()}
    return {"seed": seed, "accuracy": accuracy, "seconds": seconds}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(Path(folder), seed))
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for arm in rows[0]["accuracy"]:
        print(f"{arm:28s} {mean(row['accuracy'][arm] for row in rows):.1f}")
    ahead = [row["accuracy"][OURS] - row["accuracy"][FILTER] for row in rows]
    error = stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else float("nan")
    print(f"ahead of the filter by {mean(ahead):.1f}, standard error {error:.1f}")
    print(f"longest: {max(sum(row['seconds'].values()) for row in rows):.0f} s")


if __name__ == "__main__":
    main()
