"""Layers with options: the ghost engine follows autograd's gradient, or names what it refuses."""

import re

import pytest
import torch
from comparison import assert_bitwise
from ghost_engines import EXACT, assert_exact, engine_of, trainable
from torch import nn
from torch.nn import functional as F

from mts_fast.hypergradient import register_layer
from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.ghost.rules import _rules
from mts_fast.hypergradient.objective import LabelledBatch


class Words(nn.Module):
    """Token and position embeddings, an output layer of its own or the table itself."""

    def __init__(self, *, tied=False, shared=False, **options):
        super().__init__()
        self.table = nn.Embedding(7, 6, **options)
        self.positions = nn.Embedding(7, 6, **options)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 7)
        self.shared = shared
        if tied:
            self.head.weight = self.table.weight
        with torch.no_grad():  # nn.Embedding zeroes the padding row; a tied head would move it
            self.table.weight.normal_()
            self.positions.weight.normal_()

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1])
        if not self.shared:
            positions = positions.expand(tokens.shape)
        return self.head(self.mix(self.table(tokens) + self.positions(positions)).tanh().mean(1))


# 3 samples whose tokens repeat, the padding row among them; all embeddings are of 7 rows
TOKENS = torch.tensor([[1, 1, 0, 3, 0], [2, 0, 2, 2, 1], [5, 6, 1, 4, 4]])
BATCH = LabelledBatch(TOKENS, torch.tensor([1, 0, 3]))
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "negative_padding": {"padding_idx": -2},
    "max_norm": {"max_norm": 1.0},
    "max_norm_1": {"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 0},
    "frequency": {"scale_grad_by_freq": True},
    "padded_frequency": {"scale_grad_by_freq": True, "padding_idx": 1},
    "sparse": {"sparse": True},
    "sparse_padded_max_norm": {"sparse": True, "padding_idx": 0, "max_norm": 2.0},
}


def densely(gradients):
    return [None if g is None else g.to_dense() for g in gradients]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_embeddings(name, tied, shared, memory):
    """d_i is <v, autograd's gradient of l_i in this batch>: there padding and frequency count."""
    model = Words(tied=tied, shared=shared, **OPTIONS[name]).double()
    engine = engine_of(model, memory)
    direction = [torch.randn_like(p) for p in engine.parameters]
    before = [v.clone() for v in direction]
    weights = torch.rand(2, 3).double()
    for _ in range(2):
        linearization = engine.linearize(BATCH)
        results = [
            linearization.gradient(weights[0]),
            linearization.dots(direction),
            linearization.gradient(weights[1]),
        ]
        assert_bitwise(direction, before)
        losses = engine.objective.losses(BATCH)

        def autograds(p, losses=losses):
            gradients = torch.autograd.grad(losses, engine.parameters, p, retain_graph=True)
            return densely(gradients)

        for gradients, p in ((results[0], weights[0]), (results[2], weights[1])):
            for g, t in zip(gradients, autograds(p), strict=True):
                torch.testing.assert_close(g, t, rtol=EXACT, atol=EXACT)
        truth = torch.stack(
            [
                sum((v * g).sum() for v, g in zip(direction, autograds(one), strict=True))
                for one in torch.eye(3).double()
            ]
        )
        torch.testing.assert_close(results[1], truth, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shared", [False, True])
def test_max_norm_moves_the_table_once(shared):
    """As a plain forward does, and never the caller's direction."""
    model, plain = (Words(shared=shared, max_norm=1.0).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    linearization = engine_of(model).linearize(BATCH)
    plain(TOKENS)
    assert_bitwise(model.state_dict(), plain.state_dict())
    direction = [10 * torch.ones_like(p) for p in model.parameters()]
    linearization.gradient(torch.ones(3).double())
    linearization.dots(direction)
    assert all((v == 10).all() for v in direction)
    assert_bitwise(model.state_dict(), plain.state_dict())


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 6, **options), nn.Linear(6, 7)

    def forward(self, tokens):
        return self.head(self.bag(tokens).tanh())


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    "options",
    [{"mode": "sum"}, {"mode": "mean"}, {"padding_idx": 0}, {"max_norm": 1.0}],
    ids=str,
)
def test_embedding_bags(options, memory):
    engine = engine_of(Bags(**options).double(), memory)
    direction, weights = [torch.randn_like(p) for p in engine.parameters], torch.rand(3).double()
    linearization = engine.linearize(BATCH)
    gradients, dots = linearization.gradient(weights), linearization.dots(direction)
    losses = engine.objective.losses(BATCH)
    jacobian = [torch.autograd.grad(loss, engine.parameters, retain_graph=True) for loss in losses]
    truth = torch.stack(
        [sum((v * g).sum() for v, g in zip(direction, gs, strict=True)) for gs in jacobian]
    )
    torch.testing.assert_close(dots, truth, rtol=EXACT, atol=EXACT)
    for k, g in enumerate(gradients):
        true = sum(p * gs[k] for p, gs in zip(weights, jacobian, strict=True))
        torch.testing.assert_close(g, true, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "max"}, "bag.weight: EmbeddingBag with mode='max' is not linear"),
        ({"scale_grad_by_freq": True}, "bag.weight: EmbeddingBag with scale_grad_by_freq=True"),
    ],
)
def test_bags_that_are_refused(options, reason):
    with pytest.raises(Unsupported, match=reason):
        engine_of(Bags(**options).double()).linearize(BATCH)


def test_layers_in_unusual_forms():
    """A weight without an output axis; padding by name; a convolution of one sample at a time."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 4, 3, padding="valid")
            self.one = nn.Conv1d(4, 3, 2, padding_mode="replicate", padding=1, dilation=2)
            self.vector = nn.Parameter(torch.randn(6))

        def forward(self, x):
            h = self.conv(x).tanh()
            return F.linear(self.one(h), self.vector)

    model = Model().double()
    batch = LabelledBatch(torch.randn(5, 2, 8).double(), torch.arange(5) % 3)
    engine = engine_of(model)
    for _ in range(2):
        assert_exact(engine, batch)

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.conv(x[0]).mean(1))[None]

    one = LabelledBatch(batch.inputs[:1], batch.labels[:1])
    assert_exact(engine_of(Single().double()), one)


def scaled(x, weight, mode="plain"):
    """A layer of a user's own with an option under which it is not linear, and one that writes."""
    if torch.overrides.has_torch_function((x, weight)) or (
        torch.overrides._len_torch_function_stack()
    ):
        return torch.overrides.handle_torch_function(scaled, (x, weight), x, weight, mode=mode)
    if mode == "square":
        return F.linear(x, weight**2)
    if mode == "write":
        weight.data.clamp_(-1, 1)
        torch._C._autograd._unsafe_set_version_counter((weight,), (weight._version + 1,))
    if mode == "fail" and not weight.requires_grad:
        raise NotImplementedError("no replay")
    return F.linear(x, weight)


class Scaled(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.body, self.weight, self.mode = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4)), mode

    def forward(self, x):
        return scaled(self.body(x).tanh(), self.weight, mode=self.mode)


def not_linear(call):
    return "not linear with mode='square'" if call.option("mode", 2, "plain") == "square" else None


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("square", "weight: not linear with mode='square'"),
        ("fail", r"weight: its layer cannot be replayed \(NotImplementedError: no replay\)"),
        ("write", "weight: its layer writes to it"),
    ],
)
def test_options_of_a_registered_layer(mode, reason, monkeypatch):
    monkeypatch.setitem(_rules, scaled, None)
    register_layer(scaled, {"weight": 1}, refuses=not_linear)
    batch = LabelledBatch(torch.randn(6, 5).double(), torch.arange(6) % 3)
    assert_exact(engine_of(Scaled("plain").double()), batch)
    engine = engine_of(Scaled(mode).double())
    engine.linearize(batch)
    assert [*engine.left.values()] and all(re.search(reason, why) for why in engine.left.values())
    if mode != "square":
        register_layer(
            scaled, {"weight": 1}, refuses=not_linear, replay_options={"mode": (2, "plain")}
        )
        assert_exact(engine_of(Scaled(mode).double()), batch)


def test_a_replay_that_fails_with_the_direction_is_named(monkeypatch):
    monkeypatch.setitem(_rules, scaled, None)

    def fails_later(call):
        return None

    register_layer(scaled, {"weight": 1}, refuses=fails_later)
    model = Scaled("plain").double()
    batch = LabelledBatch(torch.randn(6, 5).double(), torch.arange(6) % 3)
    linearization = engine_of(model).linearize(batch)
    direction = [torch.ones_like(p) for p in trainable(model)]
    direction[0] = torch.ones(2, 2).double()  # of the bare weight, which comes first
    with pytest.raises(Unsupported, match="weight: its layer cannot be replayed"):
        linearization.dots(direction)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_move_once(training, memory):
    """Instance norm updates them in train mode, and reads them in eval mode."""
    model, plain = (
        nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(24, 3),
        )
        .double()
        .train(training)
        for _ in range(2)
    )
    plain.load_state_dict(model.state_dict())
    batch = LabelledBatch(torch.randn(5, 2, 8).double(), torch.arange(5) % 3)
    engine = engine_of(model, memory)
    linearization = engine.linearize(batch)
    linearization.gradient(torch.rand(5).double())
    linearization.dots([torch.randn_like(p) for p in engine.parameters])
    linearization.gradient(torch.rand(5).double())
    plain(batch.inputs)
    assert_bitwise(model.state_dict(), plain.state_dict())
    assert_exact(engine, batch)
