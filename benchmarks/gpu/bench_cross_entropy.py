"""weighted_cross_entropy forward and backward on a GPU: the Triton kernel, torch, torch.compile and
Liger-Kernel; gradients as near to float64 as torch's first.

Bytes that must move: the logits once, their gradient once. Liger overwrites the logits with the
gradient, and so runs on a copy.
"""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from on_gpu import (
    DEVICE,
    OURS,
    assert_as_exact,
    choose,
    compare,
    compiled,
    dtype_name,
    needs_gpu,
)

import mts_fast
from mts_fast import reference

# ImageNet, twice; vocabularies of 32k, of Llama 3 and of GPT-2; sequences
SIZES = choose(
    (
        (4096, 1000),
        (16_384, 1000),
        (8192, 32_000),
        (4096, 128_256),
        (8192, 50_257),
        (8, 1024, 50_257),
    ),
    # rows in registers, rows in tiles, sequences
    ((5, 11), (2, 8200), (2, 3, 11)),
)
# a row in registers, a row in tiles
STATISTICS_SIZES = choose(((16_384, 1000), (8192, 50_257)), ((5, 11), (2, 8200)))
DTYPES = (torch.bfloat16, torch.float32)


def losses_of(logits, labels):
    """torch's per-sample losses [B]; of a sequence, the mean over its positions."""
    rows = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return rows if labels.ndim == 1 else rows.view(labels.shape).mean(1)


def draw(size, dtype):
    """logits (which require a gradient), labels, p."""
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = (2 * torch.randn(size, generator=g, device=DEVICE)).to(dtype).requires_grad_()
    labels = torch.randint(size[-1], size[:-1], generator=g, device=DEVICE)
    return logits, labels, torch.randn(size[0], generator=g, device=DEVICE).softmax(0)


def gradient_of(loss, logits):
    return lambda: torch.autograd.grad(loss(logits), logits)


def exact_gradient(logits, labels, p):
    """In float64."""
    logits = logits.detach().double().requires_grad_()
    return torch.autograd.grad((p.double() * losses_of(logits, labels)).sum(), logits)


def with_kernel(logits, labels, p, **options):
    with mts_fast.use_backend("triton"):
        return mts_fast.weighted_cross_entropy(logits, labels, p, **options)


def liger_call(logits, labels, p):
    """Liger's gradient. Only the first call, which is the checked one, sees the original logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    copy = logits.detach().clone().requires_grad_()

    def loss(x):
        rows = liger_cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="none")
        return (p * (rows if labels.ndim == 1 else rows.view(labels.shape).mean(1))).sum()

    return gradient_of(loss, copy)


def name_of(size):
    return " x ".join(map(str, size))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def bench_triton_cross_entropy(benchmark, size, dtype):
    torch.compiler.reset()
    logits, labels, p = draw(size, dtype)

    def eager(x):
        return (p * losses_of(x, labels)).sum()

    losses = {
        OURS: lambda x: with_kernel(x, labels, p)[0],
        "eager": eager,
        "torch.compile": compiled(eager),
        "torch.compile, autotuned": compiled(eager, "max-autotune-no-cudagraphs"),
    }
    calls = {label: gradient_of(loss, logits) for label, loss in losses.items()}
    if importlib.util.find_spec("liger_kernel"):
        calls["Liger"] = liger_call(logits, labels, p)
    assert_as_exact(calls, exact_gradient(logits, labels, p), torch.finfo(dtype).eps)
    compare(
        benchmark,
        calls,
        moved=2 * math.prod(size) * dtype.itemsize,
        kernel="weighted cross-entropy",
        size=name_of(size),
        dtype=dtype,
    )


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", STATISTICS_SIZES, ids=name_of)
def bench_triton_cross_entropy_statistics(benchmark, size, dtype):
    """Error norm, correctness and entropy of every sample besides the gradient."""
    torch.compiler.reset()
    logits, labels, p = draw(size, dtype)

    def eager(x):
        loss = (p * losses_of(x, labels)).sum()
        return loss, reference.sample_statistics(x.detach(), labels)

    def kernel(x):
        loss, _, statistics = with_kernel(x, labels, p, statistics=True)
        return loss, statistics

    def both(function):
        loss, statistics = function(logits)
        return (*torch.autograd.grad(loss, logits), *statistics)

    functions = {OURS: kernel, "eager": eager, "torch.compile": compiled(eager)}
    calls = {label: lambda function=f: both(function) for label, f in functions.items()}
    # float64 truth of the statistics, too: argmax does not round, so correctness has to be equal
    statistics = reference.sample_statistics(logits.detach().double(), labels)
    exact = exact_gradient(logits, labels, p) + tuple(statistics)
    for i, what in enumerate(("gradient", "error norm", "correct", "entropy")):
        parts = {label: lambda call=call, i=i: [call()[i]] for label, call in calls.items()}
        try:
            assert_as_exact(parts, [exact[i]], torch.finfo(dtype).eps)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
    compare(
        benchmark,
        calls,
        moved=2 * math.prod(size) * dtype.itemsize,
        kernel="weighted cross-entropy with statistics",
        size=name_of(size),
        dtype=dtype,
    )
