"""One training step of five models: plain, published, by double backward, and MTSStep.

Equal selector gradients are asserted first. All arms of a model take turns; ratios are medians over
that of the plain step. MTSStep is timed in calls 9 and on, between two of those that check its dots
(1, 2, 4, 8, 16, ...). Peak memory is the most that a step allocates, above what was allocated
before. Bytes and operations of a step are counted operator by operator (roofline.py); the load of
the machine does not change them.
"""

import pytest
from measure import peak_bytes, ratios
from roofline import step_cost
from step_arms import Ours, arms_of
from step_models import BATCH, BUILD, make_task

from mts_fast.tuning.timing import interleaved

ROUNDS = 5
# calls of MTSStep before those that are timed: the last of them is checked, the next is the 16th,
# after ROUNDS, one for the memory and one that is counted
WARM_UP = 8
MIB = 2**20
# relative error of the selector's gradient against double backward in float32: exact engines round
# (observed at most 7e-7), differences with h = 1e-2 have a truncation error (observed 3e-3).
ALLOWED = {"exact": 1e-4, "differences": 3e-2}


def assert_equal_gradients(name, arms):
    """Every arm's first step gives the selector the gradient that double backward gives it."""
    for arm in arms.values():
        arm.step()
    truth = arms["double backward (torch.func)"].selector_gradient
    for label, arm in arms.items():
        # the plain step has no selector gradient, and another batch has another one
        if label in ("plain", "published, two batches"):
            continue
        differs = "difference" in label or label == "published" or name == "resnet18_batchnorm"
        allowed = ALLOWED["differences" if differs else "exact"]
        gap = (arm.selector_gradient - truth).norm() / truth.norm()
        assert gap < allowed, f"{label}: {gap:.1e}"


@pytest.mark.parametrize("name", list(BUILD))
def bench_step(benchmark, name):
    task = make_task(name)
    arms = {label: make(task) for label, make in arms_of(name).items()}
    assert_equal_gradients(name, arms)
    for arm in arms.values():
        if isinstance(arm, Ours):
            for _ in range(WARM_UP - 1):
                arm.step()
    seconds = {}

    def measure():
        seconds.update(interleaved({label: arm.step for label, arm in arms.items()}, ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    time = ratios(seconds, "plain")
    memory = {label: peak_bytes(arm.step) / MIB for label, arm in arms.items()}
    costs = {label: step_cost(arm.step) for label, arm in arms.items()}
    benchmark.extra_info["batch"] = BATCH[name]
    benchmark.extra_info["rows"] = {
        label: {
            "time": round(time[label], 3),
            "published / this": round(time["published"] / time[label], 3),
            "peak_mib": round(memory[label]),
            "GB": round(costs[label].bytes / 1e9, 3),
            "GFLOP": round(costs[label].flops / 1e9, 2),
        }
        for label in arms
    }
