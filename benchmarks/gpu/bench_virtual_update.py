"""theta', kappa v and the perturbations of finite differences on a GPU: the Triton kernels, the
reference, foreach, torch.compile and torch's optimizers; equal results first.

All allocate their results except torch's optimizers, which write in place and also write the
buffers.
"""

import pytest
import torch
from gpu_models import BUILD
from on_gpu import DEVICE, OURS, choose, compare, compiled, needs_gpu
from update_baselines import (
    FOREACH,
    FOREACH_DIRECTION,
    OPTIMIZERS,
    directions_one_by_one,
    draw_update,
    foreach_perturb,
    one_by_one,
    stepped,
)

import mts_fast
from mts_fast import reference
from mts_fast.backends.triton import virtual_update as kernel
from mts_fast.ops.perturb import global_norm, perturb
from mts_fast.tuning.judge import relative_error

MODELS = choose(("resnet50_batchnorm", "vit_s", "gpt_125m"), ("vit_s",))
# streams of the parameters' size that must move:
# reads parameter, gradient and state, writes theta'
UPDATE_STREAMS = {"sgd": 4, "adamw": 5}
# reads v, for AdamW also gradient and state; writes kappa v
DIRECTION_STREAMS = {"sgd": 2, "adamw": 5}
# reads v for its norm, then v and parameter, and writes two results
PERTURB_STREAMS = 5
STEP = 1e-2
# float32 results of the same equation in another order of operations: a few roundings
ALLOWED = 1e-5


def shapes_of(model):
    with torch.device("meta"):
        return [p.shape for p in BUILD[model]().parameters()]


def assert_equal(calls, base):
    truth = [t.double() for t in calls[base]()]
    for label, call in calls.items():
        error = relative_error(call(), truth)
        assert error < ALLOWED, f"{label}: {error:.1e}"


def in_place(update, optimizer, **options):
    """The step of torch's optimizer, on copies of the parameters."""
    leaves = [torch.nn.Parameter(p.clone()) for p in update.parameters]
    return stepped(optimizer, leaves, update.gradients, **options).step


def report(benchmark, calls, update, streams, kernel_name, model):
    entries = sum(p.numel() for p in update.parameters)
    moved = streams * 4 * entries
    facts = {"kernel": kernel_name, "size": f"{model}, {len(update.parameters)} tensors"}
    compare(benchmark, calls, moved=moved, dtype=torch.float32, **facts)


@needs_gpu
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("model", MODELS)
def bench_triton_virtual_update(benchmark, model, optimizer):
    torch.compiler.reset()
    update = draw_update(shapes_of(model), optimizer, DEVICE)
    traced = compiled(lambda p, g: one_by_one(p, g, update.states))
    calls = {
        OURS: lambda: kernel.virtual_update(*update.arguments),
        "reference": lambda: one_by_one(*update.arguments),
        "foreach": lambda: FOREACH[optimizer](*update.arguments),
        "torch.compile": lambda: traced(update.parameters, update.gradients),
    }
    assert_equal(calls, "reference")
    calls |= {
        "torch's fused step": in_place(update, optimizer, fused=True),
        "torch's foreach step": in_place(update, optimizer, foreach=True),
    }
    streams = UPDATE_STREAMS[optimizer]
    report(benchmark, calls, update, streams, f"virtual update, {optimizer}", model)


@needs_gpu
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("model", MODELS)
def bench_triton_hypergradient_direction(benchmark, model, optimizer):
    torch.compiler.reset()
    update = draw_update(shapes_of(model), optimizer, DEVICE)
    along = [torch.randn_like(p) for p in update.parameters]
    # only exact zeros are masked, as by foreach
    largest = torch.zeros((), device=DEVICE)
    traced = compiled(lambda p, g, v: directions_one_by_one(p, g, update.states, v, largest))
    foreach = FOREACH_DIRECTION[optimizer]
    calls = {
        OURS: lambda: kernel.hypergradient_direction(*update.arguments, along, None, largest)[0],
        "reference": lambda: directions_one_by_one(*update.arguments, along, largest),
        "foreach": lambda: foreach(*update.arguments, along),
        "torch.compile": lambda: traced(update.parameters, update.gradients, along),
    }
    assert_equal(calls, "reference")
    streams = DIRECTION_STREAMS[optimizer]
    report(benchmark, calls, update, streams, f"hypergradient direction, {optimizer}", model)


@needs_gpu
@pytest.mark.parametrize("model", MODELS)
def bench_triton_perturb(benchmark, model):
    """theta + e v and theta - e v with e = h / ||v||."""
    torch.compiler.reset()
    update = draw_update(shapes_of(model), "sgd", DEVICE)
    along = [torch.randn_like(p) for p in update.parameters]

    def plain(parameters, along):
        epsilon = STEP / reference.global_norm(along)
        plus = reference.perturb(parameters, along, epsilon)
        return plus + reference.perturb(parameters, along, -epsilon)

    def with_kernels():
        with mts_fast.use_backend("triton"):
            epsilon = STEP / global_norm(along)
            plus = perturb(update.parameters, along, epsilon)
            return plus + perturb(update.parameters, along, -epsilon)

    def foreach():
        plus, minus = foreach_perturb(update.parameters, along, STEP)
        return [*plus, *minus]

    traced = compiled(plain)
    calls = {
        OURS: with_kernels,
        "reference": lambda: plain(update.parameters, along),
        "foreach": foreach,
        "torch.compile": lambda: traced(update.parameters, along),
    }
    assert_equal(calls, "reference")
    report(benchmark, calls, update, PERTURB_STREAMS, "norm and perturbations", model)
