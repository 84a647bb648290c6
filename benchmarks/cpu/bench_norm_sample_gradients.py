"""Every sample's gradients of a norm: the C++ kernel; the norm, its product with b and two sums, as
ghost does without the kernel; and torch.compile of that. Errors against float64 are compared first.

The kernel is called as ghost calls it, without the op's checks. The implementations take turns.
Bytes that must move: x and b once.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import ratios

from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.registry import implementation
from mts_fast.ops.norm_sample_gradients import GROUP_NORM, LAYER_NORM
from mts_fast.tuning.judge import relative_error
from mts_fast.tuning.timing import interleaved

# B, T, C: a ViT, a GPT, a wider ViT, no positions
ROWS = ((32, 65, 192), (8, 256, 256), (32, 197, 384), (256, 1, 128))
# B, C, S: maps of a ResNet; of 64 and 16 positions, where auto takes torch
MAPS = ((32, 64, 1024), (32, 64, 256), (32, 64, 144), (32, 128, 64), (32, 256, 16))
GROUPS = 16
THREADS = (1, 2)
ROUNDS = 60
# as tests/ops: twice torch's error, and a rounding
ERROR_FACTOR = 2
needs_kernel = pytest.mark.skipif(not extension().available, reason=extension().reason)


def measure(benchmark, kernel, plain, shape, threads):
    torch.compiler.reset()
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    x, b = (torch.randn(shape, generator=g) for _ in "xb")
    traced = torch.compile(plain, dynamic=False)
    calls = {
        "C++": lambda: kernel(x, b),
        "reference": lambda: plain(x, b),
        "torch.compile": lambda: traced(x, b),
    }
    truth = plain(x.double(), b.double())
    allowed = ERROR_FACTOR * relative_error(calls["reference"](), truth) + torch.finfo(x.dtype).eps
    for label, call in calls.items():
        assert relative_error(call(), truth) <= allowed, label
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(2 * x.nbytes / median / 1e9, 1),
    }


@pytest.fixture(autouse=True)
def same_threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", ROWS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("norm", ["layer", "rms"])
def bench_layer_norm(benchmark, norm, shape, threads):
    centered = norm == "layer"

    def plain(x, b):
        if centered:
            return F.layer_norm(x, x.shape[2:]).mul_(b).sum(1), b.sum(1)
        return (F.rms_norm(x, x.shape[2:], eps=1e-5).mul_(b).sum(1),)

    run = implementation(LAYER_NORM, "cpp")

    def kernel(x, b):
        sums = run(x, b, 1e-5, centered, centered)
        return sums if centered else sums[:1]

    measure(benchmark, kernel, plain, shape, threads)


@needs_kernel
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", MAPS, ids=lambda shape: "group-" + "x".join(map(str, shape)))
def bench_group_norm(benchmark, shape, threads):
    def plain(x, b):
        products = F.group_norm(x, GROUPS).mul_(b)
        return tuple(t.transpose(1, 2).sum(1) for t in (products, b))

    run = implementation(GROUP_NORM, "cpp")
    measure(benchmark, lambda x, b: run(x, b, GROUPS, 1e-5), plain, shape, threads)
