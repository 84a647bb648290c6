"""Tries other tiles for the Triton kernels: the fastest for each size. A command, not a test.

`python benchmarks/gpu/tune.py [--json FILE] [KERNEL ...]` sets the kernels' module constants to
alternatives, checks that results stay the same, times them in turns, and prints the fastest. With
MTS_FAST_BENCH_TINY=1 TRITON_INTERPRET=1 it runs on small sizes, on the CPU.
"""

import argparse
import gc
import json
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "common"))
from on_gpu import DEVICE, choose, dtype_name, rounded, tf32, why_not
from tune_settings import GROUPS

from mts_fast.tuning.judge import relative_error
from mts_fast.tuning.timing import on_device

ROUNDS = choose(20, 1)
# largest relative error, by the result's dtype: the same sums in another order
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@contextmanager
def in_force(setting):
    """Sets module constants to those of a setting, then back."""
    before = [(module, name, getattr(module, name)) for module, name, _ in setting]
    for module, name, value in setting:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def under(setting, run):
    def call():
        with in_force(setting):
            return run()

    return call


def tune(kernel, case):
    """One row: microseconds of every setting that runs, and the fastest."""
    calls, failed = {}, {}
    truth = None
    for label, setting in case.settings.items():
        call = under(setting, case.run)
        try:
            results = [t for t in call() if t.numel()]
        # the exception for a tile that is too large depends on the compiler
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        truth = truth or [t.double() for t in results]
        error = relative_error(results, truth)
        if not error < ALLOWED[case.dtype]:
            failed[label] = f"another result: {error:.1e}"
            continue
        calls[label] = call
    seconds = on_device(calls, ROUNDS, DEVICE).device
    us = {label: 1e6 * statistics.median(times) for label, times in seconds.items()}
    best = min(us, key=us.__getitem__, default=None)
    current = next(iter(case.settings))
    return {
        "kernel": kernel,
        "size": case.size,
        "dtype": dtype_name(case.dtype),
        "now": current,
        "best": best,
        "now / best": round(us[current] / us[best], 3) if current in us else None,
        "us": rounded(us),
        "failed": failed,
    }


def line_of(row):
    """One row as text, with the settings that failed."""
    gain = f"{row['now / best']} x faster than {row['now']}"
    failures = f"; failed: {', '.join(row['failed'])}" if row["failed"] else ""
    return f"{row['kernel']:28} {row['size']:24} {row['dtype']:9} {row['best']} ({gain}){failures}"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    if why_not():
        sys.exit(f"tune: {why_not()}")
    rows = []
    with tf32(True):
        for kernel in asked.kernels or GROUPS:
            for case in GROUPS[kernel]():
                rows.append(tune(kernel, case))
                print(line_of(rows[-1]), flush=True)
                gc.collect()
                if asked.json:
                    # after every row, so that an interrupted run leaves its rows so far
                    asked.json.write_text(json.dumps(record_of(rows), indent=1) + "\n")


def record_of(rows):
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return {"command": "make gpu-tune", "machine": f"{name}, torch {torch.__version__}"} | {
        "rows": rows
    }


if __name__ == "__main__":
    main(sys.argv[1:])
