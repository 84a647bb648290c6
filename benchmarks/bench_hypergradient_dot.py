"""hypergradient_dot: the C++ kernel, products in place and anew, vecdot, torch.compile.

All ways take turns; equal sums are asserted first. Bytes that must move: both tensors, once.
"""

import pytest
import torch
from measure import interleaved, ratios

from mts_fast._extension import extension
from mts_fast.ops import hypergradient_dot

# outputs of a small ViT's layers and of its MLP, of an MLP's, of a ResNet's early layer; and one
# that no cache holds
SIZES = ((32, 65 * 192), (64, 65 * 768), (256, 1024), (32, 64 * 32 * 32), (16, 512 * 4096))
ROUNDS = 50


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def bench_hypergradient_dot(benchmark, batch, length):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, generator=g)
    # of signs, so that the product in place never leaves the range of floats
    y = torch.randn(batch, length, generator=g).sign()
    compiled = torch.compile(lambda x, y: (x * y).sum(1))
    calls = {
        "C++": lambda: hypergradient_dot(x, y),
        "product in place": lambda: x.mul_(y).sum(1),
        "product anew": lambda: (x * y).sum(1),
        "vecdot": lambda: torch.linalg.vecdot(x, y),
        "torch.compile": lambda: compiled(x, y),
    }
    for label, call in calls.items():
        truth = (x.double() * y.double()).sum(1)
        assert ((call() - truth).abs() / truth.abs().max()).max() < 1e-5, label
        if label == "product in place":
            x.mul_(y)  # as it was
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "B": batch,
        "n": length,
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(8 * batch * length / median / 1e9, 1),
    }
