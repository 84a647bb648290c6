"""virtual_update: the C++ kernel, the reference, foreach and torch.compile; equal results first.

All ways take turns and allocate their results. Bytes that must move: parameter, gradient and
buffers read, the result written.
"""

import pytest
import torch
from measure import interleaved, ratios

from mts_fast import reference
from mts_fast._extension import extension
from mts_fast.ops.virtual_update import optimizer_states
from mts_fast.ops.virtual_update_cpp import virtual_update

MODELS = {
    "mlp": [(784, 1024), (1024,), (1024, 1024), (1024,), (1024, 10), (10,)],
    "vit": [(384, 1536), (1536,), (1536, 384), (384,), (384, 384), (384,), (1152, 384)] * 6,
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
}
ROUNDS = 30


def foreach_sgd(parameters, gradients, states):
    s = states[0]
    step = torch._foreach_add(gradients, parameters, alpha=s.weight_decay)
    torch._foreach_add_(step, [state.buffer for state in states], alpha=s.momentum)
    return torch._foreach_add(parameters, step, alpha=-s.lr)


def foreach_adamw(parameters, gradients, states):
    s = states[0]
    (beta1, beta2), steps = s.betas, s.step + 1
    mean = torch._foreach_lerp([state.exp_avg for state in states], gradients, 1 - beta1)
    square = torch._foreach_mul([state.exp_avg_sq for state in states], beta2)
    torch._foreach_addcmul_(square, gradients, gradients, 1 - beta2)
    torch._foreach_div_(square, 1 - beta2**steps)
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, s.eps)
    kept = torch._foreach_mul(parameters, 1 - s.lr * s.weight_decay)
    torch._foreach_addcdiv_(kept, mean, square, -s.lr / (1 - beta1**steps))
    return kept


def one_by_one(parameters, gradients, states):
    return list(map(reference.virtual_update, parameters, gradients, states))


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("model", list(MODELS))
def bench_virtual_update(benchmark, model, optimizer):
    g = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(s, generator=g) for s in MODELS[model]]  # noqa: E731
    leaves = [torch.nn.Parameter(t) for t in draw()]
    live = OPTIMIZERS[optimizer](leaves)
    for p, gradient in zip(leaves, draw(), strict=True):
        p.grad = gradient
    live.step()
    states = list(optimizer_states(live).values())
    arguments = [p.detach() for p in leaves], draw(), states
    foreach = foreach_sgd if optimizer == "sgd" else foreach_adamw
    compiled = torch.compile(lambda p, g: one_by_one(p, g, states))
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
    moved = streams * 4 * sum(p.numel() for p in leaves)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "parameters": sum(p.numel() for p in leaves),
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(moved / median / 1e9, 1),
    }
