"""linear_cross_entropy forward and backward on a GPU: the Triton kernels, which never write the
logits, torch, torch.compile and Liger-Kernel; gradients as near to float64 as torch's first.

All samples have the same weight, so that Liger's mean, the faster of its two forms, can take part.
Operations at least: three products of the size of the logits'; our kernels form the logits twice.
"""

import importlib.util

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

# (rows, width D, classes C): the heads of GPT-2 and of Llama 3 (8B)
SIZES = choose(((8192, 768, 50_257), (8192, 4096, 128_256)), ((5, 16, 70),))
DTYPES = (torch.bfloat16,)
# rows of the float64 truth at a time: the logits of all rows would not fit
TRUTH_ROWS = 1024


def mean_loss(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight), labels)


def exact_gradients(hidden, weight, labels):
    """The gradients by hidden and weight, in float64."""
    to_hidden, to_weight = [], 0.0
    weight = weight.detach().double().requires_grad_()
    for rows, row_labels in zip(hidden.split(TRUTH_ROWS), labels.split(TRUTH_ROWS), strict=True):
        rows = rows.detach().double().requires_grad_()
        loss = mean_loss(rows, weight, row_labels) * (len(rows) / len(hidden))
        d_rows, d_weight = torch.autograd.grad(loss, (rows, weight))
        to_hidden.append(d_rows)
        to_weight = to_weight + d_weight
    return torch.cat(to_hidden), to_weight


def liger_implementations(p):
    """Liger's mean, and its losses weighted by p as ours are."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    return {
        "Liger, mean": lambda h, w, y: fused(h, w, y, reduction="mean"),
        "Liger, weighted": lambda h, w, y: (p * fused(h, w, y, reduction="none")).sum(),
    }


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def bench_triton_linear_cross_entropy(benchmark, size, dtype):
    torch.compiler.reset()
    rows, width, classes = size
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=g, device=DEVICE) * width**-0.5
    weight = weight.to(dtype).requires_grad_()
    labels = torch.randint(classes, (rows,), generator=g, device=DEVICE)
    p = torch.full((rows,), 1 / rows, device=DEVICE)

    def kernel(h, w, y):
        with mts_fast.use_backend("triton"):
            return (p * mts_fast.linear_cross_entropy(h, w, y)).sum()

    losses = {OURS: kernel, "eager": mean_loss, "torch.compile": compiled(mean_loss)}
    if importlib.util.find_spec("liger_kernel"):
        losses |= liger_implementations(p)
    calls = {
        label: lambda loss=loss: torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        for label, loss in losses.items()
    }
    assert_as_exact(calls, exact_gradients(hidden, weight, labels), torch.finfo(dtype).eps)
    compare(
        benchmark,
        calls,
        flops=6 * rows * width * classes,
        kernel="linear cross-entropy",
        size=f"{rows} x {width} x {classes}",
        dtype=dtype,
    )
