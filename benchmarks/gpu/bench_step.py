"""One training step on a GPU: plain, published and MTSStep, time and peak memory.

ResNet-50 (BatchNorm, GroupNorm), ViT-S and a 125M GPT; in float32, in float32 with TF32, and under
bf16 autocast, where the published schedule runs in float32, too. Selector gradients are compared
first. An arm that does not fit is recorded as such.
"""

import gc
import statistics
from contextlib import ExitStack

import pytest
import torch
from gpu_models import make_gpu_task
from measure import interleaved, peak_bytes
from on_gpu import DEVICE, MIB, choose, needs_gpu, tf32
from step_arms import Ours, Plain, Published

# (model, batch, precision). The large batch is for the precisions that people train in.
CASES = choose(
    [
        (model, batch, precision)
        for model, batch in (
            ("resnet50_batchnorm", 256),
            ("resnet50_groupnorm", 256),
            ("vit_s", 256),
            ("gpt_125m", 16),
        )
        for precision in ("float32", "tf32", "bf16")
    ]
    + [
        ("resnet50_batchnorm", 1024, "tf32"),
        ("resnet50_batchnorm", 1024, "bf16"),
        ("resnet50_groupnorm", 1024, "bf16"),
    ],
    [
        ("resnet50_batchnorm", 3, "float32"),
        ("resnet50_groupnorm", 3, "bf16"),
        ("vit_s", 4, "tf32"),
        ("gpt_125m", 3, "bf16"),
    ],
)
ROUNDS = choose(5, 1)
# batches from here on are also streamed in micro-batches
LARGE = choose(1024, 4)
MICRO_BATCH = choose(256, 2)
BASE = "auto, exact, reference"
# largest relative error of the selector's gradient against BASE in the same precision: of the exact
# engines by rounding alone, and of differences, which truncate (3e-3 seen on a CPU) and whose
# losses carry the precision's rounding divided by the step. None: recorded, not bounded.
ALLOWED = {
    "float32": {"exact": 1e-3, "differences": 5e-2},
    "tf32": {"exact": 5e-2, "differences": None},
    "bf16": {"exact": 1e-1, "differences": None},
}
OUT_OF_MEMORY = "out of memory"


def in_precision(step, precision):
    """The step as it is run in that precision."""

    def run():
        with ExitStack() as stack:
            stack.enter_context(tf32(precision != "float32"))
            if precision == "bf16":
                stack.enter_context(torch.autocast(DEVICE.type, torch.bfloat16))
            step()

    return run


def arms_of(name, batch, precision):
    """label -> (how it is made, the precision it runs in)."""
    arms = {"plain": (Plain, precision), "published": (Published, precision)}
    if precision == "bf16":
        arms["published, float32"] = (Published, "float32")
    for schedule in ("exact", "reuse"):
        for backend in ("reference", "triton"):
            options = {"schedule": schedule, "backend": backend}
            arms[f"auto, {schedule}, {backend}"] = (_ours(options), precision)
    # streaming changes what BatchNorm sees
    if batch >= LARGE and "batchnorm" not in name:
        options = {"backend": "triton", "micro_batch": MICRO_BATCH}
        arms[f"auto, exact, triton, micro-batches of {MICRO_BATCH}"] = (_ours(options), precision)
    return arms


def _ours(options):
    return lambda task: Ours(task, **options)


def fits(call):
    """Run it; False where the memory did not suffice."""
    try:
        call()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    # outside of the handler, whose traceback would keep the tensors
    gc.collect()
    torch.cuda.empty_cache()
    return False


def peak_mib(call):
    """None where the memory did not suffice this time."""
    found = []
    fits(lambda: found.append(round(peak_bytes(call) / MIB)))
    return found[0] if found else None


def gaps_of(arms):
    """Relative error of every selector gradient against that of BASE."""
    if BASE not in arms:
        return {}
    truth = arms[BASE].selector_gradient
    found = {label: arm.selector_gradient for label, arm in arms.items() if label != "plain"}
    return {label: ((g - truth).norm() / truth.norm()).item() for label, g in found.items()}


def assert_equal(gaps, precision, name):
    """Where the mathematics is the same; a published step in another precision is recorded."""
    for label, gap in gaps.items():
        differs = label.startswith("published") or name == "resnet50_batchnorm"
        allowed = ALLOWED[precision]["differences" if differs else "exact"]
        assert gap == gap, f"{label}: not a number"
        assert allowed is None or gap < allowed, f"{label}: {gap:.1e}, allowed {allowed:.1e}"


@needs_gpu
@pytest.mark.parametrize(
    ("name", "batch", "precision"), CASES, ids=["-".join(map(str, case)) for case in CASES]
)
def bench_gpu_step(benchmark, name, batch, precision):
    gc.collect()
    torch.cuda.empty_cache()
    task = make_gpu_task(name, batch, DEVICE)
    arms, calls = {}, {}
    made = arms_of(name, batch, precision)
    for label, (make, own) in made.items():
        arm = make(task)
        call = in_precision(arm.step, own)
        if fits(call):
            arms[label], calls[label] = arm, call
    gaps = gaps_of(arms)
    assert_equal(gaps, precision, name)
    seconds, failed = {}, set()

    def timed(label):
        if not fits(calls[label]):
            failed.add(label)

    def measure():
        turns = {label: lambda label=label: timed(label) for label in calls}
        seconds.update(interleaved(turns, ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    rows = {label: {"time": OUT_OF_MEMORY} for label in made}
    median = {x: statistics.median(own) for x, own in seconds.items() if x not in failed}
    for label, own in median.items():
        rows[label] = {
            "ms": round(1e3 * own, 2),
            "time": round(own / median["plain"], 3) if "plain" in median else None,
            "peak_mib": peak_mib(calls[label]),
            "gap": float(f"{gaps[label]:.1e}") if label in gaps else None,
        }
    benchmark.extra_info |= {"model": name, "batch": batch, "precision": precision, "rows": rows}
