"""virtual_update, and kappa v of AdamW: the C++ kernels, the reference, foreach and torch.compile;
equal results first.

The implementations take turns and allocate their results. Bytes that must move: parameter, gradient
and buffers read, the result written.
"""

import pytest
import torch
from deep_models import DEEP_MODELS
from measure import ratios
from update_baselines import (
    FOREACH,
    FOREACH_DIRECTION,
    OPTIMIZERS,
    directions_one_by_one,
    draw_update,
    one_by_one,
    stepped,
)

from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.cpp.virtual_update import hypergradient_direction, virtual_update
from mts_fast.ops import virtual_update as virtual_update_of
from mts_fast.reference.update_rules import largest_gradient
from mts_fast.tuning.timing import interleaved

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
        for result, truth in zip(call(), calls["reference"](), strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-6, atol=1e-6, msg=label)
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


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def bench_host_time_of_many_small_tensors(benchmark, optimizer):
    """The public function, with all that it checks and reads, against torch's own foreach step: 152
    parameters of a deep and narrow ViT, on which arithmetic costs next to nothing."""
    shapes = [p.shape for p in DEEP_MODELS["ViT-12"]().parameters()]
    drawn = draw_update(shapes, optimizer)
    leaves = [torch.nn.Parameter(p.clone()) for p in drawn.parameters]
    live = stepped(optimizer, leaves, drawn.gradients, foreach=True)
    along = [torch.randn_like(p) for p in drawn.parameters]
    update = virtual_update_of(live, drawn.gradients)
    calls = {
        "virtual_update": lambda: virtual_update_of(live, drawn.gradients),
        "scale": lambda: update.scale(along),
        "torch's step": live.step,
    }
    live.step()
    for mine, truth in zip(update.parameters, leaves, strict=True):
        torch.testing.assert_close(mine, truth.detach(), rtol=1e-6, atol=1e-6)
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    benchmark.extra_info |= {
        "parameters": len(leaves),
        "ratios": {k: round(r, 2) for k, r in ratios(seconds, "virtual_update").items()},
    }


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize("model", list(MODELS))
def bench_hypergradient_direction(benchmark, model):
    update = draw_update(MODELS[model], "adamw")
    v = [torch.randn_like(p) for p in update.parameters]
    largest = largest_gradient(update.gradients)
    p, g, states = update.arguments
    compiled = torch.compile(lambda p, g, v: directions_one_by_one(p, g, states, v, largest))
    calls = {
        "C++": lambda: hypergradient_direction(p, g, states, v, None, largest)[0],
        "reference": lambda: directions_one_by_one(p, g, states, v, largest),
        "foreach": lambda: FOREACH_DIRECTION["adamw"](p, g, states, v),
        "torch.compile": lambda: compiled(p, g, v),
    }
    for label, call in calls.items():
        for result, truth in zip(call(), calls["reference"](), strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5, msg=label)
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    entries = sum(t.numel() for t in p)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "parameters": entries,
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        # gradient, two moments, v, result; AdamW's decay leaves the parameter unread
        "GB/s": round(5 * 4 * entries / median / 1e9, 1),
    }
