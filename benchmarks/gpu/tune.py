"""Other tiles for the Triton kernels: which is fastest at which size. A command, not a test.

`python benchmarks/gpu/tune.py [--json FILE] [KERNEL ...]` sets the kernels' module constants to
a few alternatives, checks that results stay the same, times all in turns, and says which won. With
MTS_FAST_BENCH_TINY=1 TRITON_INTERPRET=1 it runs small, on the CPU.
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
from measure import on_device
from on_gpu import DEVICE, choose, dtype_name, relative_error, rounded, tf32, why_not
from tune_settings import GROUPS

ROUNDS = choose(20, 1)
# the same sums in another order, in the dtype of the result
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@contextmanager
def in_force(setting):
    """Module constants set to others."""
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
            found = [t for t in call() if t.numel()]
        # the compiler refuses a tile that is too large in ways of its own
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        truth = truth or [t.double() for t in found]
        error = relative_error(found, truth)
        if not error < ALLOWED[case.dtype]:
            failed[label] = f"another result: {error:.1e}"
            continue
        calls[label] = call
    seconds = on_device(calls, ROUNDS, DEVICE)
    us = {label: 1e6 * statistics.median(own) for label, own in seconds.items()}
    best = min(us, key=us.__getitem__, default=None)
    now = next(iter(case.settings))
    return {
        "kernel": kernel,
        "size": case.size,
        "dtype": dtype_name(case.dtype),
        "now": now,
        "best": best,
        "now / best": round(us[now] / us[best], 3) if now in us else None,
        "us": rounded(us),
        "failed": failed,
    }


def line_of(row):
    """What one row says, with the settings that did not run."""
    gain = f"{row['now / best']} x faster than {row['now']}"
    failures = f"; failed: {', '.join(row['failed'])}" if row["failed"] else ""
    return f"{row['kernel']:28} {row['size']:24} {row['dtype']:9} {row['best']} ({gain}){failures}"


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    if why_not():
        sys.exit(f"tune_triton: {why_not()}")
    rows = []
    with tf32(True):
        for kernel in asked.kernels or GROUPS:
            for case in GROUPS[kernel]():
                rows.append(tune(kernel, case))
                print(line_of(rows[-1]), flush=True)
                gc.collect()
                if asked.json:
                    # after every row, so that a run that is cut short leaves what it has
                    asked.json.write_text(json.dumps(record_of(rows), indent=1) + "\n")


def record_of(rows):
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return {"command": "make gpu-tune", "machine": f"{name}, torch {torch.__version__}"} | {
        "rows": rows
    }


if __name__ == "__main__":
    main(sys.argv[1:])
