"""Where samples lie, and that they are not mixed: what one forward cannot tell is not guessed."""

import pytest
import torch
from ghost_engines import LowRank, SequenceFirst, assert_exact, batch_of, engine_of, step_on
from torch import nn

from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.objective import LabelledBatch


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("first", [1, 2, 8])  # 1: every layout fits
def test_the_first_batch_decides_nothing_it_cannot_tell(first, memory):
    engine = engine_of(SequenceFirst().double(), memory)
    assert_exact(engine, batch_of(first, 16, 5))
    for _ in range(3):  # 16 positions are a multiple of 8 samples
        assert_exact(engine, batch_of(8, 16, 5))
    assert_exact(engine, batch_of(1, 16, 5))


@pytest.mark.parametrize("positions", [6, 12, 3])  # as many as samples; multiples; a divisor
def test_square_batches(positions):
    engine = engine_of(SequenceFirst().double())
    for _ in range(3):
        assert_exact(engine, batch_of(6, positions, 5))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_identical_samples(sequence_first):
    x = torch.randn(1, 6, 5).double().expand(6, -1, -1).clone()
    batch = LabelledBatch(x, torch.zeros(6).long())
    model = SequenceFirst().double()
    if not sequence_first:
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    engine = engine_of(model)
    for _ in range(3):
        assert_exact(engine, batch)
    assert_exact(engine, batch_of(6, 6, 5))


class OwnPosition(nn.Module):
    """Sample i is classified by its position `where[i]`."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, where):
        hidden = self.body(x.transpose(0, 1)).tanh()
        return self.head(hidden[where, torch.arange(x.shape[0])])


def test_a_batch_for_which_two_axes_are_right():
    """Gradients on the diagonal of [T, B] leave the axis open; the next batch does not."""
    engine = engine_of(OwnPosition().double())
    for where in (torch.arange(6), torch.randperm(6), torch.zeros(6).long()):
        for _ in range(2):
            batch = batch_of(6, 6, 5)
            assert_exact(engine, LabelledBatch([batch.inputs, where], batch.labels))


class Branch(nn.Module):
    """Synthetic samples take another branch, with the sequence first."""

    def __init__(self):
        super().__init__()
        self.real, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.first = nn.Linear(5, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x, synthetic):
        other = self.encoder(self.first(x.transpose(0, 1))).mean(0)
        return self.head(torch.where(synthetic[:, None], other, self.real(x).mean(1)))


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_batches_that_are_sorted_by_source(memory):
    """The first batches have no sample for the branch, then some at the end, then one."""
    engine = engine_of(Branch().double(), memory)
    for synthetic in (0, 0, 0, 16, 8, 1, 32, 0):
        batch, flags = batch_of(32, 64, 5), torch.arange(32) >= 32 - synthetic
        assert_exact(engine, LabelledBatch([batch.inputs, flags], batch.labels))


def mix_by_index(h):
    return 0.7 * h + 0.3 * h[torch.randperm(len(h))]


def mix_by_slices(h):
    k = 1 + int(torch.randint(len(h) - 1, ()))
    return 0.7 * h + 0.3 * torch.cat([h[k:], h[:k]])


def mix_by_matrix(h):
    return 0.7 * h + 0.3 * torch.eye(len(h)).double()[torch.randperm(len(h))] @ h


# ways to mix hidden features in half of the forwards: by control flow or by a factor of 0
MIXTURES = {
    "index": lambda h, u: mix_by_index(h) if u < 0.5 else h,
    "where": lambda h, u: torch.where(u < 0.5, mix_by_index(h), h),
    "factor": lambda h, u: h + (u < 0.5) * (h.flip(0) - h) * 0.3,
    "slices": lambda h, u: mix_by_slices(h) if u < 0.5 else h,
    "roll": lambda h, u: 0.7 * h + 0.3 * h.roll(int(u < 0.5), 0),
    "matrix": lambda h, u: mix_by_matrix(h) if u < 0.5 else h,
    "mean": lambda h, u: h + (u < 0.5) * h.mean(0),
    "index_select": lambda h, u: h.index_select(
        0, torch.randperm(len(h)) if u < 0.5 else torch.arange(len(h))
    ),
    "in_place": lambda h, u: h.clone().index_copy_(0, torch.tensor([0]), h[int(u < 0.5)][None]),
    "transposed": lambda h, u: h + 0.1 * h.mT if u < 0.5 else h,  # as many features as samples
}


class Mixup(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(5, 8), mix, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mix(self.body(x).tanh(), torch.rand(())))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixing_that_depends_on_a_draw_is_refused_in_every_call(name, memory):
    model = Mixup(MIXTURES[name]).double()
    engine, refused = engine_of(model, memory), []
    for seed in range(30):
        torch.manual_seed(seed)
        mixed = bool(torch.rand(()) < 0.5)
        try:
            assert_exact(engine, batch_of(8, 5), seed)
        except Unsupported as error:
            assert "samples are mixed" in str(error)
            refused.append(mixed)
            assert mixed
        else:
            assert not mixed
        step_on(model)
    assert 5 < len(refused) < 25


def test_a_refused_forward_leaves_nothing_behind():
    """No verdict, no draw: the forward that follows is checked as the first one."""
    engine, batch = engine_of(Mixup(MIXTURES["index"]).double()), batch_of(8, 5)
    torch.manual_seed(next(seed for seed in range(9) if first_draw(seed) < 0.5))
    before = torch.get_rng_state()
    with pytest.raises(Unsupported):
        engine.linearize(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not engine._histories
    assert_exact(engine, batch, next(seed for seed in range(9) if first_draw(seed) >= 0.5))


def first_draw(seed):
    torch.manual_seed(seed)
    return float(torch.rand(()))


class Gated(nn.Module):
    """The batch's mean behind a factor that starts at zero."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x):
        h = self.body(x)
        return self.head(h + self.gate * h.mean(0))


def test_mixing_behind_a_zero_is_found_when_it_is_none():
    model = Gated().double()
    engine = engine_of(model)
    for _ in range(3):  # not a number of forwards at which a check is due
        model.gate.zero_()
        engine.linearize(batch_of(6, 5))
        model.gate.fill_(0.1)
        with pytest.raises(Unsupported, match="samples are mixed"):
            engine.linearize(batch_of(6, 5))


def test_routing_by_value_is_right_or_refused():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.expert, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.body(x).tanh().flatten(0, 1)
            y, chosen = h.clone(), x.flatten(0, 1)[:, 0] > 0
            y[chosen] = self.expert(h[chosen])
            return self.head(y.view(x.shape).mean(1))

    engine, served = engine_of(Routed().double()), 0
    for tokens in (32, 0, 8, 16, 16, 24, 32, 8):  # multiples of the 8 samples
        batch = batch_of(8, 4, 5)
        batch.inputs[..., 0] = -1
        batch.inputs.flatten(0, 1)[torch.randperm(32)[:tokens], 0] = 1
        try:
            assert_exact(engine, batch)
            served += 1
        except Unsupported as refused:
            assert "samples are mixed" in str(refused)
    assert served >= 2  # all tokens, or none, keep their order


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_layers_without_a_gradient_at_first(memory):
    model = LowRank().double()
    engine = engine_of(model, memory)
    for number in range(6):  # zero for three forwards, as in a warm-up of the learning rate
        assert_exact(engine, batch_of(4, 8, 5))
        if number > 2:
            step_on(model)


class Shuffled(torch.autograd.Function):
    """Mixing where no function call between layers shows it."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return 0.5 * x + 0.5 * x[order]

    @staticmethod
    def backward(ctx, b):
        return 0.5 * b + 0.5 * torch.zeros_like(b).index_copy(0, ctx.order, b), None


def test_mixing_inside_an_autograd_function():
    def mix(h, u):
        return Shuffled.apply(h, torch.randperm(8) if u < 0.5 else torch.arange(8))

    engine = engine_of(Mixup(mix).double())
    for seed in range(20):
        if first_draw(seed) < 0.5:
            with pytest.raises(Unsupported, match="samples are mixed"):
                engine.linearize(_seeded(seed))
        else:
            assert_exact(engine, batch_of(8, 5), seed)


def _seeded(seed):
    batch = batch_of(8, 5)
    torch.manual_seed(seed)
    return batch
