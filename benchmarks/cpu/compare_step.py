"""The step of this checkout against that of another commit, turn by turn in one run.

    python benchmarks/cpu/compare_step.py --before 5476895          # make bench-compare BEFORE=...

Each side is a separate process with its checkout's mts_fast and this checkout's benchmarks; they
take steps in turns, never at the same time. Ratios are medians over rounds of after / before.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks" / "results" / "step_compared.json"
MODELS = ("vit", "resnet18_groupnorm", "resnet18_batchnorm", "mlp", "gpt")
OPTIMIZERS = ("momentum", "adamw")
ROUNDS, WARM_UP = 11, 2
MIB = 2**20
# options of MTSStep by arm; the older side uses those that its MTSStep has
ARMS = {
    "exact": {"atomic": False},
    "exact, atomic": {"atomic": True},
    "reuse": {"schedule": "reuse", "atomic": False},
}
# under BatchNorm "auto" is finite differences at 5476895 and forward mode in this checkout. So the
# arms name one engine for both sides, and "auto" is an arm by itself
SAME_ENGINE = {"engine": "finite_difference"}
BATCHNORM_ARMS = {name: {**options, **SAME_ENGINE} for name, options in ARMS.items()}
BATCHNORM_ARMS["auto, exact"] = ARMS["exact"]


def serve():
    """Makes arms and takes their steps, by JSON orders from standard input."""
    import inspect

    import torch
    from measure import peak_bytes
    from step_arms import Ours
    from step_models import make_task

    import mts_fast

    known = inspect.signature(mts_fast.MTSStep).parameters
    arm = None
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"package": mts_fast.__file__, "threads": torch.get_num_threads()}
        if order["do"] == "make":
            options = {k: v for k, v in order["options"].items() if k in known}
            torch.manual_seed(0)
            try:
                arm = Ours(make_task(order["model"]), optimizer=order["optimizer"], **options)
                for _ in range(WARM_UP):
                    arm.step()
            except RuntimeError as error:  # the guard found no engine for this model
                answer["refused"] = str(error)
        elif order["do"] == "step":
            start = time.perf_counter()
            arm.step()
            answer["seconds"] = time.perf_counter() - start
        else:
            answer["peak"] = peak_bytes(arm.step)
        print(json.dumps(answer), flush=True)


class Side:
    """One checkout, in a separate process."""

    def __init__(self, package):
        path = os.pathsep.join([str(package), str(ROOT / "benchmarks" / "common")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=package,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, **order):
        """Send an order and wait for its answer."""
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"compare_step: a side ended at {order}")
        return json.loads(answer)


def checked_out(commit):
    """A worktree of the other commit in build/, with this checkout's compiled library."""
    folder = ROOT / "build" / f"before-{commit}"
    if not folder.exists():
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(folder), commit], cwd=ROOT, check=True
        )
    for built in [*(ROOT / "mts_fast").glob("*.so"), ROOT / "mts_fast" / "_build.json"]:
        shutil.copy(built, folder / "mts_fast")
    return folder


def compared(before, after, **order):
    """Medians and ratios of one arm."""
    sides = {"before": before, "after": after}
    for name, side in sides.items():
        if refused := side.ask(do="make", **order).get("refused"):
            return {"refused": {name: refused}}
    seconds = {name: [] for name in sides}
    for turn in range(ROUNDS):
        for name in sorted(sides, reverse=bool(turn % 2)):
            seconds[name].append(sides[name].ask(do="step")["seconds"])
    ratios = [a / b for a, b in zip(seconds["after"], seconds["before"], strict=True)]
    quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
    peak = {name: side.ask(do="peak")["peak"] for name, side in sides.items()}
    return {
        "milliseconds": {n: round(1e3 * statistics.median(s), 2) for n, s in seconds.items()},
        "time": round(median, 3),
        "quartiles": [round(quarter, 3), round(three_quarters, 3)],
        "peak_mib": {n: round(p / MIB) for n, p in peak.items()},
    }


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="5476895", help="commit to compare with")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    before, after = Side(checked_out(arguments.before)), Side(ROOT)
    # an earlier run's rows of other models are kept
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    rows = {k: v for k, v in rows.items() if k.partition(",")[0] not in arguments.models}
    for model in arguments.models:
        for optimizer in OPTIMIZERS:
            arms = BATCHNORM_ARMS if model == "resnet18_batchnorm" else ARMS
            for label, options in arms.items():
                row = compared(before, after, model=model, optimizer=optimizer, options=options)
                rows[f"{model}, {optimizer}, {label}"] = row
                command = f"python benchmarks/cpu/compare_step.py --before {arguments.before}"
                result = {"command": command, "rounds": ROUNDS, "rows": rows}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{model}, {optimizer}, {label}: {row}", flush=True)


if __name__ == "__main__":
    main()
