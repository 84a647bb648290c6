"""One step on 256 candidates: plain, exact, and with a quarter or an eighth of them computed.

One thread; V = M/8. Ratios are medians over the plain step of all candidates. MTSStep is timed in
calls 9 and on, between two of those that check its dots.
"""

import pytest
import torch
from measure import peak_bytes, ratios
from step_arms import Ours, Plain
from step_models import make_task

from mts_fast.tuning.timing import interleaved

CANDIDATES = 256
ROUNDS = 3
WARM_UP = 8
MIB = 2**20


@pytest.fixture(autouse=True)
def one_thread():
    """The ratios of small models depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["vit", "resnet18_groupnorm", "resnet18_batchnorm", "mlp", "gpt"])
def bench_sampled_step(benchmark, name):
    task = make_task(name, CANDIDATES)
    arms = {"plain": Plain(task), "exact": Ours(task)}
    for part in (4, 8):
        arms[f"M/{part}"] = Ours(task, compute=CANDIDATES // part)
    arms["M/8, candidates in bfloat16"] = Ours(
        task, compute=CANDIDATES // 8, candidate_dtype=torch.bfloat16
    )
    for arm in arms.values():
        if isinstance(arm, Ours):
            for _ in range(WARM_UP):
                arm.step()
    seconds = {}

    def measure():
        seconds.update(interleaved({label: arm.step for label, arm in arms.items()}, ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    time = ratios(seconds, "plain")
    memory = {label: peak_bytes(arm.step) / MIB for label, arm in arms.items()}
    benchmark.extra_info["candidates"] = CANDIDATES
    benchmark.extra_info["rows"] = {
        label: {
            "time": round(time[label], 3),
            "exact / this": round(time["exact"] / time[label], 3),
            "peak_mib": round(memory[label]),
        }
        for label in arms
    }
