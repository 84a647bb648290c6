"""cross_entropy forward and backward: the C++ kernel, torch, torch.compile; equal gradients first.

The implementations take turns. Bytes that must move: the logits twice, their gradient once.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import ratios

import mts_fast
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import cross_entropy
from mts_fast.tuning.timing import interleaved

# digits, CIFAR-100, ImageNet, a vocabulary
SIZES = ((256, 10), (1024, 100), (256, 1000), (1024, 1000), (256, 32_000))
ROUNDS = 30


@pytest.mark.skipif(not extension().available, reason=extension().reason)
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def bench_cross_entropy(benchmark, batch, classes):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=g, requires_grad=True)
    labels = torch.randint(classes, (batch,), generator=g)
    p = torch.rand(batch, generator=g).softmax(0)
    compiled = torch.compile(
        lambda logits: (p * F.cross_entropy(logits, labels, reduction="none")).sum()
    )

    def with_kernel(logits):
        with mts_fast.use_backend("cpp"):
            return (p * cross_entropy(logits, labels)).sum()

    implementations = {
        "C++": with_kernel,
        "reference": lambda x: (p * F.cross_entropy(x, labels, reduction="none")).sum(),
        "torch.compile": compiled,
    }
    calls = {
        label: lambda loss=loss: torch.autograd.grad(loss(logits), logits)[0]
        for label, loss in implementations.items()
    }
    truth = calls["reference"]()
    for label, call in calls.items():
        torch.testing.assert_close(call(), truth, rtol=1e-5, atol=1e-9, msg=label)
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    median = sorted(seconds["C++"])[ROUNDS // 2]
    benchmark.extra_info |= {
        "ratios": {label: round(r, 2) for label, r in ratios(seconds, "C++").items()},
        "GB/s": round(12 * batch * classes / median / 1e9, 1),
    }
