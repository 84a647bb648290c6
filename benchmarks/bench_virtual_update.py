"""virtual_update: the C++ kernel, the reference, foreach and torch.compile; equal results first.

All ways take turns and allocate their results. Bytes that must move: parameter, gradient and
buffers read, the result written.
"""

import pytest
import torch
from measure import interleaved, ratios
from update_ways import FOREACH, OPTIMIZERS, draw_update, one_by_one

from mts_fast._extension import extension
from mts_fast.ops.virtual_update_cpp import virtual_update

MODELS = {
    "mlp": [(784, 1024), (1024,), (1024, 1024), (1024,), (1024, 10), (10,)],
    "vit": [(384, 1536), (1536,), (1536, 384), (384,), (384, 384), (384,), (1152, 384)] * 6,
}
ROUNDS = 30


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("model", list(MODELS))
def bench_virtual_update(benchmark, model, optimizer):
    update = draw_update(MODELS[model], optimizer)
    arguments = update.arguments
    foreach = FOREACH[optimizer]
    compiled = torch.compile(lambda p, g: one_by_one(p, g, update.states))
    calls = {
        "C++": lambda: virtual_update(*arguments),
        "reference": lambda: one_by_one(*arguments),
        "foreach": lambda: foreach(*arguments),
        "torch.compile": lambda: compiled(*arguments[:2]),
    }
    for label, call in calls.items():
        for mine, truth in zip(call(), calls["reference"](), strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-6, msg=label)
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    # parameter, gradient, state, result
    streams = 4 if optimizer == "sgd" else 5
    entries = sum(p.numel() for p in update.parameters)
    moved = streams * 4 * entries
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "parameters": entries,
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(moved / median / 1e9, 1),
    }
