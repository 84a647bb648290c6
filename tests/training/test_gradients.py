"""`.grad` as a backward leaves it: each gradient in memory of its own."""

import pytest
import torch

from mts_fast.training.gradients import set_gradients

BUCKET = torch.arange(12.0)
IMAGE = torch.arange(24.0).reshape(1, 2, 3, 4)
ONE = torch.arange(4.0)
# gradients, and which of them must be copied
CASES = {
    "apart": ([torch.ones(3), torch.zeros(2, 2), None], []),
    "side by side": ([BUCKET[:4], BUCKET[4:8].view(2, 2), BUCKET[8:]], []),
    "one twice": ([ONE, torch.ones(3), ONE], [2]),
    "overlapping": ([BUCKET[:6], BUCKET[5:9]], [1]),
    "inside another": ([BUCKET, torch.ones(2), BUCKET[3:4]], [2]),
    "expanded": ([torch.ones(1).expand(3), torch.ones(3)], [0]),
    "no entries": ([torch.zeros(0), torch.zeros(0, 2), ONE], []),
    "channels last": ([IMAGE.to(memory_format=torch.channels_last), ONE], []),
    "interleaved": ([BUCKET[::2], BUCKET[1::2]], [1]),
    "two dtypes": ([torch.ones(2, dtype=torch.float64), torch.ones(3)], []),
}


@pytest.mark.parametrize("case", CASES)
def test_each_gradient_has_memory_of_its_own(case):
    gradients, copied = CASES[case]
    parameters = [
        torch.nn.Parameter(torch.ones(2) if g is None else torch.zeros_like(g)) for g in gradients
    ]
    other = torch.nn.Parameter(torch.ones(2))
    for p in (*parameters, other):
        p.grad = torch.ones_like(p)
    set_gradients(torch.optim.SGD([*parameters, other], lr=0.1), parameters, gradients)
    assert other.grad is None
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        assert (p.grad is None) == (g is None)
        if g is not None:
            assert torch.equal(p.grad, g)
            assert (p.grad is g) == (i not in copied)
    present = [p.grad for p in parameters if p.grad is not None]
    values = [g.clone() for g in present]
    for i, g in enumerate(present):  # as clipping writes: no other gradient moves
        g.add_(1.0)
        values[i].add_(1.0)
        assert all(map(torch.equal, present, values))
        g.sub_(1.0)
        values[i].sub_(1.0)
