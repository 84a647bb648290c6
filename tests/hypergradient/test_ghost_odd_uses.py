"""Uses beside the tested path: views written to, checkpoints, gradients inside a forward, complex
numbers, backwards that leave something out, parameters that nobody tracks."""

import pytest
import torch
from ghost_engines import EXACT, assert_exact, batch_of, engine_of, true_norms
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mts_fast.hypergradient.ghost import Ghost, Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms
from mts_fast.hypergradient.objective import Objective

SIZE, STEPS, WIDTH = 6, 5, 8


class Body(nn.Module):
    """A layer, the part under test, a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.head(self.part(self.body(x).tanh()).tanh().mean(1))


class WrittenView(Body):
    def part(self, x):
        x = x * 1.0
        x[:, 0].add_(self.weight)
        flat = x.view(len(x), -1)
        flat += self.weight.repeat(STEPS)
        return x


class CheckpointedScale(Body):
    def part(self, x):
        return checkpoint(
            lambda t: (t * self.weight + 1).tanh() * (1 + self.weight), x, use_reentrant=False
        )


class Complex(Body):
    def part(self, x):
        turned = (
            torch.fft.rfft(x, dim=-1)
            * torch.view_as_complex(self.weight[:6].view(3, 2)).repeat(2)[:5]
        )
        return torch.fft.irfft(turned, n=WIDTH, dim=-1)


class OnlyItsDtype(Body):
    def part(self, x):
        return x.type_as(self.weight) + x.to(self.weight) * self.weight.expand_as(x)


class Doubling(torch.autograd.Function):
    """2 w, whose backward hides from autograd."""

    @staticmethod
    def forward(ctx, weight):
        return 2 * weight

    @staticmethod
    def backward(ctx, b):
        return torch.from_numpy(2 * b.detach().numpy())


class HiddenBackward(Body):
    def part(self, x):
        return x * Doubling.apply(self.weight)


class OneEntryEach(Body):
    """Scores of gathered rows, one number each."""

    def part(self, x):
        rows = x.flatten(0, 1)
        index = torch.arange(len(rows)).flip(0)[::2]
        scores = rows[index] @ self.weight
        out = torch.zeros_like(rows).index_add(
            0, index, rows[index] * (scores * self.weight[0])[:, None]
        )
        return out.view_as(x)


class WholeBatch(Body):
    """A weight with one entry for every sample."""

    def part(self, x):
        return x + self.weight[:SIZE].tanh()[:, None, None] * self.weight[:, None].T


SERVED = {
    "written_view": WrittenView,
    "checkpointed_scale": CheckpointedScale,
    "complex": Complex,
    "only_its_dtype": OnlyItsDtype,
    "hidden_backward": HiddenBackward,
    "one_entry_each": OneEntryEach,
    "whole_batch": WholeBatch,
}


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", SERVED)
def test_odd_uses_are_exact_or_refused(name, memory):
    torch.manual_seed(5)
    engine = engine_of(SERVED[name]().double(), memory)
    try:
        for call in range(3):
            assert_exact(engine, batch_of(SIZE, STEPS, WIDTH), seed=call)
    except Unsupported as refused:
        assert name == "hidden_backward" and "weight" in str(refused)


class Summed(nn.Module):
    """An input without a gradient is added to in place, beside another branch."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(WIDTH))
        self.token, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 3)
        self.branch = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        tokens = (x[..., 0].abs() * 10).long() % 7
        y = x.clone()
        y += self.position
        return self.head(self.token(tokens).mean(1) + self.branch(y).tanh().mean(1))


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_an_input_that_is_added_to_in_place_hides_no_branch(memory):
    torch.manual_seed(6)
    model = Summed().double()
    engine = engine_of(model, memory)
    for call in range(3):
        assert_exact(engine, batch_of(SIZE, STEPS, WIDTH), seed=call)
    batch = batch_of(SIZE, STEPS, WIDTH)
    truth = true_norms(engine, batch)
    torch.testing.assert_close(gradient_norms(engine, batch), truth, rtol=EXACT, atol=EXACT)


class Penalised(Body):
    """The forward differentiates itself."""

    def part(self, x):
        (slope,) = torch.autograd.grad((x * self.weight).square().sum(), x, create_graph=True)
        return x + slope


def test_a_gradient_inside_the_forward_is_a_reason():
    with pytest.raises(Unsupported, match="takes gradients itself"):
        engine_of(Penalised().double()).linearize(batch_of(SIZE, STEPS, WIDTH))


class Factors(Body):
    """A weight of two factors; one of them is used elsewhere in a way that is left over."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def part(self, x):
        hidden = F.gumbel_softmax(x + 0 * self.scale, dim=-1)
        return x * (self.weight * self.scale) + F.rrelu(hidden * 0 + self.scale, 0.5, 0.5, True)


def test_a_factor_that_is_left_over_keeps_its_derived_part():
    engine = engine_of(Factors().double())
    assert_exact(engine, batch_of(SIZE, STEPS, WIDTH))


class Partly(Body):
    """Two factors, of which the optimizer holds one."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.randn(WIDTH))

    def part(self, x):
        return x * (self.weight * (self.other / self.other.norm())) + F.linear(
            x, torch.outer(self.other, self.weight)
        )


def test_parameters_that_the_optimizer_does_not_hold_are_constants():
    model = Partly().double()
    parameters = [p for n, p in model.named_parameters() if n != "other"]
    engine = Ghost(Objective(model), parameters)
    assert_exact(engine, batch_of(SIZE, STEPS, WIDTH))
    assert not engine.left


class Stacking(Body):
    """Two rows are gathered and stacked: their axis is another one then."""

    def part(self, x):
        rows = x.flatten(0, 1)
        index = (rows[:, 0] > rows[:, 0].sort(descending=True).values[2]).nonzero()[:, 0]
        both = torch.stack([rows[index], rows[index] * self.weight]).sum(0)
        return torch.zeros_like(rows).index_add(0, index, both).view_as(x) + x


def test_rows_that_are_stacked_are_not_mistaken():
    torch.manual_seed(7)
    engine = engine_of(Stacking().double())
    for call in range(6):
        assert_exact(engine, batch_of(SIZE, STEPS, WIDTH), seed=call)
