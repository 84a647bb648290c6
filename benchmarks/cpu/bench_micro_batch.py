"""A batch 8 times as large, streamed in micro-batches: time per sample and peak memory."""

import pytest
from measure import peak_bytes, ratios
from step_arms import Ours
from step_models import BATCH, make_task

from mts_fast.tuning.timing import interleaved

ROUNDS = 5
MICRO_BATCHES = 8


@pytest.mark.parametrize("name", ["vit", "resnet18_groupnorm"])
def bench_micro_batch(benchmark, name):
    """Small whole batches against large streamed ones."""
    size = BATCH[name] // 2
    small = Ours(make_task(name, size))
    large = Ours(make_task(name, size * MICRO_BATCHES), micro_batch=size)
    small.step()
    large.step()
    seconds = {}

    def measure():
        seconds.update(interleaved({"whole": small.step, "streamed": large.step}, ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    memory = {label: peak_bytes(arm.step) for label, arm in (("s", small), ("l", large))}
    benchmark.extra_info["batch"] = size
    benchmark.extra_info["micro-batches"] = MICRO_BATCHES
    benchmark.extra_info["time per sample, streamed / whole"] = round(
        ratios(seconds, "whole")["streamed"] / MICRO_BATCHES, 3
    )
    benchmark.extra_info["peak memory, streamed / whole"] = round(memory["l"] / memory["s"], 3)
