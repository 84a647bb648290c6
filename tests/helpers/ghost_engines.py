"""Ghost engines on small models, against double backward."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mts_fast import reference
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.objective import LabelledBatch, Objective

EXACT = 1e-9  # float64; observed 1e-15


def batch_of(size, *shape, classes=3):
    return LabelledBatch(torch.randn(size, *shape).double(), torch.arange(size) % classes)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def engine_of(model, memory="fast", loss=None):
    return Ghost(Objective(model, loss), trainable(model), memory=memory)


def assert_exact(engine, batch, seed=0):
    """Both gradients and the dots of one forward are double backward's, drawn from one seed."""
    direction = [torch.randn_like(p) for p in engine.parameters]
    weights = torch.rand(2, len(batch)).double()
    torch.manual_seed(seed)
    line = engine.linearize(batch)
    results = [line.gradient(weights[0]), line.dots(direction), line.gradient(weights[1])]
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        losses = engine.objective.losses(batch)
    truth = reference.hypergradient_dots(losses, engine.parameters, direction)
    torch.testing.assert_close(results[1], truth, rtol=EXACT, atol=EXACT)
    for gradients, p in ((results[0], weights[0]), (results[2], weights[1])):
        true = torch.autograd.grad(
            losses, engine.parameters, p, retain_graph=True, allow_unused=True
        )
        for g, t in zip(gradients, true, strict=True):
            assert (g is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(g, t, rtol=EXACT, atol=EXACT)


def true_norms(engine, batch):
    """||grad l_i|| [B], one backward per sample."""
    losses = engine.objective.losses(batch)
    rows = [torch.autograd.grad(loss, engine.parameters, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])


def step_on(model):
    with torch.no_grad():
        for p in trainable(model):
            p.add_(torch.randn_like(p), alpha=0.1)


class SequenceFirst(nn.Module):
    """A [T, B, D] encoder inside a model of [B, T, 5] inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.head(self.encoder(self.first(x.transpose(0, 1))).mean(0))


class LowRank(nn.Module):
    """A frozen layer with a trainable product beside it that starts at zero."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        x = x.transpose(0, 1)
        h = (self.body(x) + self.up(self.down(x))).tanh().mean(0)
        self.unused(h)
        return self.head(h)
