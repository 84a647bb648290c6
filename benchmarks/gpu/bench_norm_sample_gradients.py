"""Every sample's gradients of a norm's weight and bias on a GPU: the Triton kernels; the norm, its
in-place product with b and two sums, as the engine does without the kernels; and torch.compile of
that. Errors against float64 are compared with torch's first.
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
)

import mts_fast
from mts_fast import ops

# [B, T, C]: layers of a ViT-S at B = 256 and of a GPT of 125M at B = 16; a row of 4096
ROWS = choose(
    {"vit": (256, 197, 384), "gpt": (16, 512, 768), "long rows": (8, 512, 4096)},
    {"rows": (2, 5, 12)},
)
# [B, C, S] in 32 groups: maps of a ResNet-50 at B = 256; the first is read in tiles
MAPS = choose(
    {
        "resnet stage 1": (256, 256, 56 * 56),
        "resnet stage 2": (256, 512, 28 * 28),
        "resnet stage 4": (256, 2048, 7 * 7),
    },
    {"maps": (2, 32, 9)},
)
GROUPS = 32
DTYPES = (torch.bfloat16, torch.float32)


def measure(benchmark, fused, plain, size, dtype, kernel):
    """Check and time one size."""
    torch.compiler.reset()
    torch.manual_seed(0)
    name, shape = size
    x, b = (torch.randn(shape, device=DEVICE).to(dtype) for _ in "xb")
    traced = compiled(lambda: plain(x, b))

    def ours():
        with mts_fast.use_backend("triton"):
            return list(fused(x, b))

    calls = {
        OURS: ours,
        "eager": lambda: list(plain(x, b)),
        "torch.compile": lambda: list(traced()),
    }
    # in float64, a sample at a time
    pairs = [plain(*(t[i : i + 1].double() for t in (x, b))) for i in range(len(x))]
    truth = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    assert_as_exact(calls, truth, torch.finfo(dtype).eps)
    size = f"{name}: {' x '.join(map(str, shape))}"
    compare(benchmark, calls, moved=x.nbytes + b.nbytes, kernel=kernel, size=size, dtype=dtype)


def total(t, axis):
    """Sum in float32 at least."""
    return t.sum(axis, dtype=torch.promote_types(t.dtype, torch.float32))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", list(ROWS))
def bench_triton_layer_norm(benchmark, name, dtype):
    def plain(x, b):
        return total(F.layer_norm(x, x.shape[2:]).mul_(b), 1), total(b, 1)

    fused = ops.layer_norm_sample_gradients
    measure(benchmark, fused, plain, (name, ROWS[name]), dtype, "layer norm's sample gradients")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", list(MAPS))
def bench_triton_group_norm(benchmark, name, dtype):
    def plain(x, b):
        return total(F.group_norm(x, GROUPS).mul_(b), 2), total(b, 2)

    def fused(x, b):
        return ops.group_norm_sample_gradients(x, b, GROUPS)

    measure(benchmark, fused, plain, (name, MAPS[name]), dtype, "group norm's sample gradients")
