"""Row 6 of one layer on a GPU: the Triton kernels; the replay with an in-place product and a sum,
as the engine does without the kernels; and torch.compile of that. Errors against float64 are
compared with torch's first.
"""

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
    tf32,
)

import mts_fast
from mts_fast import ops

# [B, T, K] times [N, K]: layers of a ViT-S at B = 256 and of a GPT of 125M at B = 16
LINEAR = choose(
    {
        "vit qkv": (256, 197, 384, 1152),
        "vit out": (256, 197, 384, 384),
        "vit mlp, in": (256, 197, 384, 1536),
        "vit mlp, out": (256, 197, 1536, 384),
        "gpt qkv": (16, 512, 768, 2304),
        "gpt mlp, in": (16, 512, 768, 3072),
        "gpt mlp, out": (16, 512, 3072, 768),
        "gpt head": (16, 512, 768, 50_257),
    },
    {"linear": (2, 5, 8, 12)},
)
# 1 x 1 convolutions of a ResNet-50 at B = 256, T = H W
CONVOLUTIONS = choose(
    {
        "resnet stage 1": (256, 56 * 56, 64, 256),
        "resnet stage 2": (256, 28 * 28, 512, 128),
        "resnet stage 3": (256, 14 * 14, 1024, 256),
        "resnet stage 4": (256, 7 * 7, 512, 2048),
    },
    {"convolution": (2, 4, 8, 12)},
)
# outputs of layers whose replay is not a product: a LayerNorm of the ViT, a convolution
SAMPLES = choose({"vit tokens": (256, 197 * 384), "resnet map": (256, 64 * 56 * 56)}, {"s": (3, 9)})
DTYPES = (torch.bfloat16, torch.float32)
# TF32 has 10 bits of mantissa; triton truncates to them where cuBLAS rounds
TF32_EPS = 2**-10


def draw(*shape, dtype):
    """Standard normal random tensor."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def multiplied_and_summed(replayed, b):
    """Per-sample dot products [B]; overwrites the replayed output."""
    return replayed.mul_(b).flatten(1).sum(1, dtype=torch.float32)


def name_of(layer, size):
    return f"{layer}: {' x '.join(map(str, size))}"


def product_calls(replay, fused, b):
    """Label -> call, which takes the dot products of the replayed output with b."""
    traced = compiled(lambda: multiplied_and_summed(replay(), b))

    def kernel():
        with mts_fast.use_backend("triton"):
            return [fused()]

    return {
        OURS: kernel,
        "eager": lambda: [multiplied_and_summed(replay(), b)],
        "torch.compile": lambda: [traced()],
    }


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layer", list(LINEAR))
def bench_triton_hypergradient_dot(benchmark, layer, dtype):
    torch.compiler.reset()
    torch.manual_seed(0)
    samples, positions, inputs, outputs = LINEAR[layer]
    a, v = draw(samples, positions, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype)
    b = draw(samples, positions, outputs, dtype=dtype)
    with tf32(True):
        calls = product_calls(lambda: F.linear(a, v), lambda: ops.hypergradient_dot(a, v, b), b)
        measure(benchmark, calls, [exact(a, v, b)], layer, LINEAR[layer], dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("layer", list(CONVOLUTIONS))
def bench_triton_convolution_dot(benchmark, layer, dtype):
    """A 1 x 1 convolution is a product with channels first."""
    torch.compiler.reset()
    torch.manual_seed(0)
    samples, positions, inputs, outputs = CONVOLUTIONS[layer]
    side = int(positions**0.5)
    image = draw(samples, inputs, side, side, dtype=dtype)
    v = draw(outputs, inputs, dtype=dtype)
    back = draw(samples, outputs, side, side, dtype=dtype)
    a, b = (t.flatten(2).transpose(1, 2) for t in (image, back))
    with tf32(True):
        calls = product_calls(
            lambda: F.conv2d(image, v[:, :, None, None]),
            lambda: ops.hypergradient_dot(a, v, b),
            back,
        )
        measure(benchmark, calls, [exact(a, v, b)], layer, CONVOLUTIONS[layer], dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", list(SAMPLES))
def bench_triton_sample_dot(benchmark, name, dtype):
    """Products of two tensors summed over each sample."""
    torch.compiler.reset()
    torch.manual_seed(0)
    x, y = draw(*SAMPLES[name], dtype=dtype), draw(*SAMPLES[name], dtype=dtype)

    def eager():
        return (x * y).sum(1, dtype=torch.float32)

    def kernel():
        with mts_fast.use_backend("triton"):
            return [ops.sample_dot(x, y)]

    traced = compiled(eager)
    calls = {
        OURS: kernel,
        "eager": lambda: [eager()],
        "torch.compile": lambda: [traced()],
        "vecdot": lambda: [torch.linalg.vecdot(x, y)],
    }
    assert_as_exact(calls, [(x.double() * y.double()).sum(1)], torch.finfo(dtype).eps)
    compare(
        benchmark,
        calls,
        moved=2 * x.numel() * dtype.itemsize,
        kernel="sample dot",
        size=name_of(name, SAMPLES[name]),
        dtype=dtype,
    )


def exact(a, v, b):
    """In float64, a sample at a time."""
    pairs = zip(a, b, strict=True)
    return torch.stack([(F.linear(x.double(), v.double()) * y.double()).sum() for x, y in pairs])


def measure(benchmark, calls, truth, layer, size, dtype):
    """Check and time, for linear layers and convolutions."""
    samples, positions, inputs, outputs = size
    assert_as_exact(calls, truth, max(torch.finfo(dtype).eps, TF32_EPS))
    compare(
        benchmark,
        calls,
        # a and b once, v once
        moved=dtype.itemsize * (samples * positions * (inputs + outputs) + inputs * outputs),
        flops=2 * samples * positions * inputs * outputs,
        kernel="hypergradient dot",
        size=name_of(layer, size),
        dtype=dtype,
    )
