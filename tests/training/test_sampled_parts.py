"""A sampled batch, every subset of it enumerated: its gradients are those of the whole batch."""

import pytest
import torch
from models import batchnorm_cnn, mlp
from subsets import design
from torch import nn

from mts_fast import reference, selector_gradient
from mts_fast.distributed import Alone
from mts_fast.hypergradient import Objective
from mts_fast.hypergradient.choice import make_engine
from mts_fast.sampling import difference_estimator, inclusion_probabilities, regression_estimator
from mts_fast.training.batch import SelectorBatch, SelectorRows, check_batch
from mts_fast.training.sampled import part as sampler
from mts_fast.training.sampled.candidates import find_head, look
from mts_fast.training.sampled.part import Drawn, Sampled, whole_gradient

M, K = 8, 4
# logits of the selector: ordinary, one that takes nearly all, some that vanish
LOGITS = {
    "ordinary": [0.5, -1.0, 0.3, 2.0, -0.2, 1.1, -2.0, 0.0],
    "one giant": [9.0, -3.0, -3.0, -4.0, -2.0, -3.0, -5.0, -3.0],
    "vanishing": [0.0, -60.0, 1.0, -40.0, 0.5, -30.0, 0.2, -50.0],
}
CLASS_WEIGHT = [0.2, 3.0, 1.0]


def mean_squares(output, labels):
    """A loss that is no cross-entropy."""
    return (output - nn.functional.one_hot(labels, output.shape[1])).square().mean(1)


class World:
    """A small classifier, M candidates, their stage 1 and two sets of weights."""

    def __init__(self, logits="ordinary", *, model=None, shape=(4,), loss=None, size=M):
        torch.manual_seed(7)
        self.model = (mlp() if model is None else model).double()
        self.parameters = list(self.model.parameters())
        self.objective = Objective(self.model, loss)
        g = torch.Generator().manual_seed(1)
        inputs = torch.randn(size, *shape, generator=g, dtype=torch.float64)
        labels = torch.arange(size) % 3
        self.batch = check_batch(SelectorBatch(inputs, labels), 3, check_values=True)
        self.direction = [torch.randn(p.shape, generator=g).double() for p in self.parameters]
        base = torch.tensor(LOGITS[logits], dtype=torch.float64)
        self.z = base.repeat(size // M)
        log_class = torch.tensor(CLASS_WEIGHT, dtype=torch.float64).log()[labels]
        self.p = (nn.functional.logsigmoid(self.z) + log_class).softmax(0)
        moved = self.z + 0.5 * torch.randn(size, generator=g).double()
        self.new_p = (nn.functional.logsigmoid(moved) + log_class).softmax(0)
        head = find_head(self.objective, self.parameters)
        self.candidates = look(self.objective, self.batch, head, None, None, check_values=True)
        self.norms = self.candidates.error_norms

    def engine(self, name="ghost"):
        return make_engine(name, self.objective, self.parameters)

    def exact_gradient(self, p):
        losses = self.objective.losses(self.batch)
        return torch.autograd.grad((p * losses).sum(), self.parameters)

    def exact_dots(self):
        losses = self.objective.losses(self.batch)
        return reference.hypergradient_dots(losses, self.parameters, self.direction).detach()

    def inclusion(self, k):
        return inclusion_probabilities(sampler.size_measure(self.p, self.norms), k)

    def part(self, monkeypatch, subset):
        """The candidates with A chosen."""
        monkeypatch.setattr(sampler, "systematic_sample", lambda inclusion, k, strata: subset)
        rows = SelectorRows(self.batch.classes, self.batch.is_synthetic)
        drawn = Drawn(rows, self.p, self.norms, len(subset), may_move=True)
        return Sampled(Alone(), self.candidates, self.candidates.head, self.batch, drawn)


def completed(part, linearization, p):
    """The gradient of sum p l over the whole batch."""
    return whole_gradient(linearization.gradient(part.weights(p)), part, part.rest(p))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("loss", [None, mean_squares], ids=["cross-entropy", "squares"])
@pytest.mark.parametrize("logits", LOGITS)
def test_rows_3_and_9_are_unbiased_by_enumeration(monkeypatch, logits, loss):
    world = World(logits, loss=loss)
    subsets, chances = design(world.inclusion(K), K)
    for p in (world.p, world.new_p):  # row 9 has other weights, and the same draw
        mean = 0
        for subset, chance in zip(subsets, chances, strict=True):
            part = world.part(monkeypatch, subset)
            linearization = world.engine().linearize(part.batch, gradients=1, dots=False)
            gradient = completed(part, linearization, p)
            mean = mean + chance * flat(gradient)
        exact = flat(world.exact_gradient(p))
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("logits", LOGITS)
def test_the_last_layer_is_exact_for_every_draw(monkeypatch, logits):
    """The difference estimator of what stage 1 knows: no draw has an error there."""
    world = World(logits)
    exact = world.exact_gradient(world.p)
    for subset in design(world.inclusion(K), K)[0][::7]:
        part = world.part(monkeypatch, subset)
        linearization = world.engine().linearize(part.batch, gradients=1, dots=False)
        gradient = completed(part, linearization, world.p)
        for i in (-1, -2):
            torch.testing.assert_close(gradient[i], exact[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("logits", LOGITS)
def test_row_7_is_unbiased_with_the_slope_held(monkeypatch, logits):
    world = World(logits)
    exact = selector_gradient(world.exact_dots(), world.z, world.p)
    known = world.candidates.approximate_dots(world.direction)
    slope = torch.tensor(1.3, dtype=torch.float64)
    mean = 0
    for subset, chance in zip(*design(world.inclusion(K), K), strict=True):
        part = world.part(monkeypatch, subset)
        dots = world.engine().dots(part.batch, world.direction)
        spread = difference_estimator(part.draw, dots, known, slope)
        mean = mean + chance * selector_gradient(spread, world.z, world.p)
    torch.testing.assert_close(mean, exact, rtol=0, atol=1e-10)


def test_the_known_dots_are_those_of_the_last_layer():
    world = World()
    known = world.candidates.approximate_dots(world.direction)
    last = [torch.zeros_like(v) for v in world.direction[:-2]] + world.direction[-2:]
    losses = world.objective.losses(world.batch)
    expected = reference.hypergradient_dots(losses, world.parameters, last)
    torch.testing.assert_close(known, expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_the_bias_of_row_7_is_of_the_order_of_one_over_k(k):
    """With the fitted slope and the ratio mean; relative to one draw's own deviation."""
    world = World(size=64)
    dots, known = world.exact_dots(), world.candidates.approximate_dots(world.direction)
    exact = selector_gradient(dots, world.z, world.p)
    pi = world.inclusion(k)
    draws = 4000
    errors = []
    for _ in range(draws):
        draw = sampler.Draw(sampler.systematic_sample(pi, k), pi)
        spread = regression_estimator(draw, world.p, dots[draw.indices], known).dots
        errors.append(selector_gradient(spread, world.z, world.p) - exact)
    errors = torch.stack(errors)
    deviation = errors.square().sum(1).mean().sqrt()
    # the mean of 4000 draws is off by 1 / sqrt(4000) = 0.016 deviations of its own
    assert float(errors.mean(0).norm() / deviation) < 2 / k


@pytest.mark.parametrize("engine", ["double_backward", "forward_mode", "finite_difference"])
def test_batchnorm_of_all_candidates_computed_is_exact(monkeypatch, engine):
    """The statistics' derivative through mean and variance is there."""
    world = World(model=batchnorm_cnn(), shape=(2, 6, 6))
    subset = torch.arange(M)
    part = world.part(monkeypatch, subset)
    linearization = world.engine(engine).linearize(part.batch, gradients=1)
    gradient = completed(part, linearization, world.p)
    torch.testing.assert_close(
        flat(gradient), flat(world.exact_gradient(world.p)), rtol=0, atol=1e-12
    )
    tolerance = 1e-8 if engine == "finite_difference" else 1e-12
    torch.testing.assert_close(
        linearization.dots(world.direction), world.exact_dots(), rtol=0, atol=tolerance
    )


def test_batchnorm_of_some_candidates_keeps_the_derivative_of_its_statistics(monkeypatch):
    """Constant statistics turn the gradient away; those of stage 1 with a derivative from A have
    values of all M, and a bias of the second order."""
    world = World(model=batchnorm_cnn(), shape=(2, 6, 6), size=32)
    exact = flat(world.exact_gradient(world.p))
    world.model.eval()  # constant statistics
    world.objective.world.refresh()
    constant = flat(world.exact_gradient(world.p))
    world.model.train()
    pi = world.inclusion(8)
    mean, draws = 0, 300
    for _ in range(draws):
        part = world.part(monkeypatch, sampler.Draw(_systematic(pi, 8), pi).indices)
        linearization = world.engine("double_backward").linearize(part.batch, gradients=1)
        gradient = completed(part, linearization, world.p)
        mean = mean + flat(gradient) / draws
    # the values of stage 1 do not depend on the draw
    stage_one = world.candidates.losses[part.draw.indices]
    torch.testing.assert_close(linearization.losses, stage_one, rtol=0, atol=1e-12)
    bias = float((mean - exact).norm() / exact.norm())
    assert bias < 0.3, "the prototype had 0.15"
    assert bias < 0.5 * float((constant - exact).norm() / exact.norm())


_systematic = sampler.systematic_sample  # as it is, beside the one that tests put in its place
