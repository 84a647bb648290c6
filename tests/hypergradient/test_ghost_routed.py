"""Ghost where tokens are routed to experts, and where a parameter is left to another way."""

import pytest
import torch
from ghost_engines import EXACT, assert_exact, batch_of, engine_of, step_on, true_norms
from torch import nn
from torch.nn import functional as F

import mts_fast
from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms
from mts_fast.hypergradient.objective import LabelledBatch

SIZE, STEPS, WIDTH, EXPERTS = 6, 5, 8, 3


class Mixture(nn.Module):
    """Each token goes to two experts; `way` is how it gets there."""

    def __init__(self, way):
        super().__init__()
        self.body, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 3)
        self.shift = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.way = way

    def expert(self, x, k):
        a, b = F.linear(self.norm(x), self.up[k]).chunk(2, -1)
        return F.linear(F.silu(a) * b, self.down[k]) + self.shift[k]

    def looped(self, x, index, share):
        out = torch.zeros_like(x)
        hits = F.one_hot(index, EXPERTS).permute(2, 1, 0)
        for k in hits.sum((1, 2)).nonzero():
            place, token = torch.where(hits[k[0]])
            out.index_add_(0, token, self.expert(x[token], k[0]) * share[token, place, None])
        return out

    def masked(self, x, index, share):
        out = torch.zeros_like(x)
        for k in range(EXPERTS):
            for place in range(2):
                mask = index[:, place] == k
                out[mask] += self.expert(x[mask], k) * share[mask, place][:, None]
        return out

    def sorted(self, x, index, share):
        order = index.flatten().argsort(stable=True)
        token = order // 2
        counts = index.flatten().bincount(minlength=EXPERTS).tolist()
        parts = x.index_select(0, token).split(counts, dim=0)
        rows = torch.cat([self.expert(part, k) for k, part in enumerate(parts)], 0)
        rows = rows * share.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, rows)

    def gathered(self, x, index, share):
        chosen = torch.einsum("tkow,tw->tko", self.up[index], self.norm(x))
        a, b = chosen.chunk(2, -1)
        rows = torch.einsum("tkow,tkw->tko", self.down[index], F.silu(a) * b) + self.shift[index]
        return (rows * share[..., None]).sum(1)

    def forward(self, x):
        x = self.body(x).tanh().flatten(0, 1)
        share, index = self.gate(x).softmax(-1).topk(2, -1)
        x = getattr(self, self.way)(x, index, share / share.sum(-1, keepdim=True))
        return self.head(x.view(SIZE if len(x) == SIZE * STEPS else -1, STEPS, WIDTH).mean(1))


WAYS = ["looped", "masked", "sorted", "gathered"]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("way", WAYS)
def test_experts_are_exact(way, memory):
    torch.manual_seed(2)
    model = Mixture(way).double()
    engine = engine_of(model, memory)
    for call in range(4):
        assert_exact(engine, batch_of(SIZE, STEPS, WIDTH), seed=call)
        step_on(model)
    assert not engine.left


@pytest.mark.parametrize("way", ["looped", "sorted"])
def test_routed_rows_that_are_followed_cost_no_check(way):
    model = Mixture(way).double()
    engine = engine_of(model)
    for _ in range(3):
        engine.linearize(batch_of(SIZE, STEPS, WIDTH))
    checks = engine._checks
    engine._histories[next(iter(engine._histories))].forwards = 4  # the next one is no power of 2
    engine.linearize(batch_of(SIZE, STEPS, WIDTH))
    assert engine._checks in (checks, checks + 1)  # a new order of experts is a new layout


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_experts_are_exact(way):
    model, batch = Mixture(way).double(), batch_of(SIZE, STEPS, WIDTH)
    engine = engine_of(model)
    truth = true_norms(engine, batch)
    torch.testing.assert_close(gradient_norms(engine, batch), truth, rtol=EXACT, atol=EXACT)


class Grouped(Mixture):
    """The experts' products of all rows in one call, as Hugging Face's mixtures have them."""

    def __init__(self):
        super().__init__("grouped")

    def grouped(self, x, index, share):
        order = index.flatten().argsort(stable=True)
        token = order // 2
        ends = index.flatten().bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
        rows = F.grouped_mm(self.norm(x)[token], self.up.transpose(1, 2), offs=ends)
        a, b = rows.chunk(2, -1)
        rows = F.grouped_mm(F.silu(a) * b, self.down.transpose(1, 2), offs=ends)
        rows = rows * share.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, rows)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_grouped_products_are_right_in_float32(memory):
    torch.manual_seed(4)
    grouped = Grouped()
    looped = Mixture("gathered").double()
    looped.load_state_dict(grouped.state_dict())
    with torch.no_grad():
        looped.shift.zero_()  # not used by the grouped products
    engine, exact = engine_of(grouped, memory), engine_of(looped)
    batch = batch_of(SIZE, STEPS, WIDTH)
    single = LabelledBatch(batch.inputs.float(), batch.labels)
    direction = [torch.randn_like(p) for p in grouped.parameters()]
    direction[[n for n, _ in grouped.named_parameters()].index("shift")].zero_()
    p = torch.rand(SIZE)
    line, truth = engine.linearize(single), exact.linearize(batch)
    for g, t in zip(line.gradient(p), truth.gradient(p.double()), strict=True):
        if g is not None:
            torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-6)
    d = line.dots(direction)
    torch.testing.assert_close(
        d.double(), truth.dots([v.double() for v in direction]), rtol=1e-4, atol=1e-6
    )
    assert not engine.left


class Exchange(Mixture):
    """The rows come back to other samples than they were taken from."""

    def __init__(self):
        super().__init__("looped")

    def looped(self, x, index, share):
        order = torch.arange(len(x)).roll(STEPS)
        rows = self.expert(x[order], 0)
        return torch.zeros_like(x).index_add(0, torch.arange(len(x)), rows)


def test_rows_that_come_back_to_other_samples_are_seen():
    engine = engine_of(Exchange().double())
    assert_exact(engine, batch_of(SIZE, STEPS, WIDTH))
    assert {engine.names[p] for p in engine.left} == {"body.weight", "body.bias"}
    assert all("samples are mixed" in why for why in engine.left.values())


class Scale(torch.autograd.Function):
    """x w with a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, b):
        x, weight = ctx.saved_tensors
        return b * weight, (b * x).sum(0)


class Mostly(nn.Module):
    """Layers that ghost serves, and a scale inside a user's function that it does not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.last(Scale.apply(self.first(x).tanh(), self.scale).tanh())


class MostlyRecurrent(nn.Module):
    """An LSTM between layers that ghost serves."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 60), nn.Linear(4, 3)
        self.middle = nn.Linear(60, 6)
        self.rnn = nn.LSTM(6, 4, batch_first=True)

    def forward(self, x):
        return self.last(self.rnn(self.middle(self.first(x).tanh()))[0][:, -1])


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize(
    ("build", "shape", "left"),
    [(Mostly, (WIDTH,), {"scale"}), (MostlyRecurrent, (STEPS, WIDTH), None)],
)
def test_parameters_that_are_left_over_are_exact(build, shape, left, memory):
    torch.manual_seed(3)
    model = build().double()
    engine = engine_of(model, memory)
    for call in range(3):
        assert_exact(engine, batch_of(SIZE, *shape), seed=call)
        step_on(model)
    names = {engine.names[p] for p in engine.left}
    assert names == (left or {n for n in engine.names.values() if n.startswith("rnn.")})


def test_explain_names_what_is_left_over_and_its_share():
    model = Mostly()
    explanation = mts_fast.explain_engine(model, torch.randn(SIZE, WIDTH), torch.arange(SIZE) % 3)
    assert explanation.choice == "ghost"
    assert explanation.left_over == {"scale": "scale is used inside Scale"}
    entries = sum(p.numel() for p in model.parameters())
    assert explanation.ghost_share == pytest.approx(1 - 12 / entries)
    assert "scale is used inside Scale" in str(explanation)


def test_a_second_derivative_that_does_not_exist_is_a_reason():
    class Once(Scale):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, b):
            x, weight = ctx.saved_tensors
            return b * weight, (b * x).sum(0)

    class Model(Mostly):
        def forward(self, x):
            return self.last(Once.apply(self.first(x).tanh(), self.scale).tanh())

    with pytest.raises(Unsupported, match="no second derivative for what is left over"):
        engine_of(Model().double()).linearize(batch_of(SIZE, WIDTH))


def test_norms_go_another_way_where_something_is_left_over():
    with pytest.raises(Unsupported, match="scale is used inside Scale"):
        gradient_norms(engine_of(Mostly().double()), batch_of(SIZE, WIDTH))
