"""hypergradient_dot: the C++ kernel, products in place and anew, vecdot, torch.compile.

The kernel as the ghost engine asks for it. All ways take turns, on outputs that change from round
to round, as they do from layer to layer; equal sums are asserted first. Bytes that must move: both
tensors, once.
"""

import itertools

import pytest
import torch
from measure import interleaved, ratios

from mts_fast._extension import extension
from mts_fast.ops.hypergradient_dot import kernel

# outputs of a small ViT's layers and of its MLP, of an MLP's, of a ResNet's early layer; and one
# that no cache holds
SIZES = ((32, 65 * 192), (64, 65 * 768), (256, 1024), (32, 64 * 32 * 32), (16, 512 * 4096))
ROUNDS = 50
# no multiple of the number of ways, so that all meet all outputs
LAYERS = 3


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize(("batch", "length"), SIZES)
def bench_hypergradient_dot(benchmark, batch, length):
    g = torch.Generator().manual_seed(0)
    outputs = [torch.randn(batch, length, generator=g) for _ in range(LAYERS)]
    turn = itertools.count()
    # of signs, so that the product in place never leaves the range of floats
    y = torch.randn(batch, length, generator=g).sign()
    compiled = torch.compile(lambda x, y: (x * y).sum(1))
    ways = {
        "C++": lambda x: kernel(x, y)(x, y),
        "product in place": lambda x: x.mul_(y).sum(1),
        "product anew": lambda x: (x * y).sum(1),
        "vecdot": lambda x: torch.linalg.vecdot(x, y),
        "torch.compile": lambda x: compiled(x, y),
    }
    for label, way in ways.items():
        truth = (outputs[0].double() * y.double()).sum(1)
        found = way(outputs[0].clone())
        assert ((found - truth).abs() / truth.abs().max()).max() < 1e-5, label
    # each call takes the next output, whatever came before it
    calls = {
        label: lambda way=way: way(outputs[next(turn) % LAYERS]) for label, way in ways.items()
    }
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "B": batch,
        "n": length,
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(8 * batch * length / median / 1e9, 1),
    }
