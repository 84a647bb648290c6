"""Whatever a forward touches, a step touches once: loss modules, buffers, generators, inputs."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from torch import nn

import mts_fast
from mts_fast.hypergradient import ENGINES

SIZE, CLASSES = 12, 3


def batch(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE + 7, 4, generator=g, dtype=dtype)
    y = torch.randint(CLASSES, (SIZE + 7,), generator=g)
    return {"inputs": x[:SIZE], "labels": y[:SIZE], "val_inputs": x[SIZE:], "val_labels": y[SIZE:]}


def step_of(model, *, selector=None, **options):
    torch.manual_seed(1)
    selector = selector or mts_fast.Selector(0, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=False,
        **options,
    )


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, CLASSES)
        self.double()


class Reassigned(Base):
    """A running centre that forward replaces, as in DINO's centring."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(8).double())
        self.register_buffer("late", None)

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * h.detach().mean(0)
            self.late = h.detach()[:1]
        return self.b(torch.tanh(h - self.centre))


class InPlace(Reassigned):
    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.centre.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.b(torch.tanh(h - self.centre.clone()))


class NumpyMask(Base):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            h = h * torch.as_tensor(np.random.rand(len(h), 8) > 0.3)
        return self.b(h)


class PythonMask(Base):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.training:
            h = h * torch.tensor([[random.random() > 0.3 for _ in range(8)] for _ in h])
        return self.b(h)


class WritesInput(Base):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x.div_(2.0))))


MODELS = {m.__name__: m for m in (Reassigned, InPlace, NumpyMask, PythonMask, WritesInput)}


def set_generators(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def generators():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_plain_forward(name, engine):
    """Buffers, generators, inputs, parameters: as a plain loop of these weights leaves them."""
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    step = step_of(model, engine=engine)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        given, untouched = batch(seed), batch(seed)
        set_generators(seed)
        result = step(**given)
        after = generators()
        set_generators(seed)
        optimizer.zero_grad()
        losses = F.cross_entropy(plain(given["inputs"].clone()), given["labels"], reduction="none")
        (result.normalized_weights * losses).sum().backward()
        optimizer.step()
        assert str(after) == str(generators())
        assert all(torch.equal(given[k], untouched[k]) for k in given)
        assert relative(result.losses, losses.detach()) < 1e-12
        for (n, found), expected in zip(
            model.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            assert relative(found, expected) < 1e-10, n
        # dots against double backward, differences to their own error
        assert result.self_check < 1e-6


class RunningNorm(nn.Module):
    """A loss with a running statistic that is its divisor, as in AdaFace."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean_norm", torch.full((), 5.0).double())
        self.modes = []

    def forward(self, logits, labels):
        self.modes.append((len(labels), self.training))
        if self.training:
            self.mean_norm.mul_(0.9).add_(0.1 * logits.detach().norm(dim=1).mean())
        return F.cross_entropy(logits / self.mean_norm.clone(), labels, reduction="none")

    def method(self, logits, labels):
        return self(logits, labels)


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_loss_module_belongs_to_the_world(engine, as_method):
    model = Base()
    model.forward = lambda x: model.b(torch.tanh(model.a(x)))
    loss = RunningNorm()
    plain = copy.deepcopy(loss)
    step = step_of(model, engine=engine, loss=loss.method if as_method else loss)
    given = batch(0)
    plain(model(given["inputs"]), given["labels"])
    result = step(**given)
    assert relative(loss.mean_norm, plain.mean_norm) < 1e-12
    assert result.self_check < 1e-6
    assert {mode for size, mode in loss.modes if size == 7} == {False} and loss.training


def test_a_loss_that_writes_into_the_labels():
    def loss(logits, labels):
        labels[labels == 2] = 0
        return F.cross_entropy(logits, labels, reduction="none")

    model = Base()
    model.forward = lambda x: model.b(torch.tanh(model.a(x)))
    step = step_of(model, loss=loss)
    for seed in range(2):
        given, untouched = batch(seed), batch(seed)
        step(**given)
        assert torch.equal(given["labels"], untouched["labels"])
        assert torch.equal(given["val_labels"], untouched["val_labels"])


class NoisySelector(nn.Module):
    """Dropout and BatchNorm: draws, and keeps statistics."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(CLASSES, 6), nn.BatchNorm1d(6)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 1)
        self.masks = []

    def forward(self, features, classes, is_synthetic):
        h = self.drop(self.norm(self.embed(classes)))
        self.masks.append(h.detach() == 0)
        return self.head(h)


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


@pytest.mark.parametrize("two_batches", [False, True])
def test_a_selector_draws_afresh_and_moves_its_statistics_once(two_batches):
    selector = NoisySelector().double()
    step = step_of(plain_model(), selector=selector)
    seen = []
    for seed in range(3):
        given = batch(seed)
        if two_batches:
            extra = batch(seed + 50)
            given["selector_batch"] = mts_fast.SelectorBatch(extra["inputs"], extra["labels"])
        selector.masks.clear()
        step(**given)
        assert int(selector.norm.num_batches_tracked) == seed + 1
        # rows 1 and 9 see the same mask
        assert torch.equal(selector.masks[0], selector.masks[-1])
        seen.append(selector.masks[0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_weights_change_nothing():
    selector = NoisySelector().double()
    step = step_of(plain_model(), selector=selector)
    given = batch(0)
    before = copy.deepcopy(selector.state_dict()), str(generators())
    step.weights(given["inputs"], given["labels"], val_inputs=given["val_inputs"])
    assert all(torch.equal(before[0][k], v) for k, v in selector.state_dict().items())
    assert before[1] == str(generators())


class Energy(nn.Module):
    """Differentiates inside forward, as a force field does."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.w(x).square().sum(), x, create_graph=True)
        return self.w(force)


def test_a_model_that_differentiates_inside_is_told_what_to_do():
    model = Energy().double()
    step = step_of(model, engine="finite_difference")
    with pytest.raises(RuntimeError, match=r"decorate its forward with torch\.enable_grad"):
        step(**batch(0))
    with torch.enable_grad():
        model.forward = torch.enable_grad()(model.forward)
    assert step(**batch(0)).self_check < 1e-6


def test_a_model_that_begins_to_write_is_named():
    class Later(Base):
        writes = False

        def forward(self, x):
            if self.writes:
                x.mul_(2.0)
            return self.b(torch.tanh(self.a(x)))

    model = Later()
    step = step_of(model)
    step(**batch(0))
    model.writes = True
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inputs must be left as they are by the model"):
        step(**batch(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_autocast_does_not_weigh_with_the_old_selector():
    """Row 9 and the next call, all inside one autocast, see the weights as they are."""
    model = plain_model().float()
    torch.manual_seed(1)
    selector = mts_fast.Selector(0, CLASSES, hidden=(8,))
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.SGD(selector.parameters(), lr=50.0),
        online_features=False,
    )
    given = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            result = step(**given)
            torch.clear_autocast_cache()
            z = selector(torch.zeros(SIZE, 0), given["labels"], torch.zeros(SIZE).bool())
            assert relative(result.logits, z.detach().float()) < 1e-6
            losses = F.cross_entropy(model(given["inputs"]).float(), given["labels"])
    with torch.autocast("cpu", torch.bfloat16):
        first = step(**given).losses.mean()
        second = step(**given).losses.mean()
    assert first != second and losses > second


class Overlapping(nn.Module):
    """Gradients of the biases are views of one tensor, that of q an expanded one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 3, bias=False)
        self.b0, self.b1 = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
        self.b2, self.q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(5))
        self.double()

    def forward(self, x):
        return self.lin(x) + torch.cat([self.b1, self.b2]) + self.b0 + self.q.sum()


@pytest.mark.parametrize("engine", ["auto", "forward_mode", "double_backward"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_that_share_memory_are_clipped_and_unscaled_once(clip, engine):
    model = Overlapping()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = step_of(model, engine=engine, max_grad_norm=clip, scaler=scaler)
    given = batch(0)
    result = step(**given)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    losses = F.cross_entropy(plain(given["inputs"]), given["labels"], reduction="none")
    (result.normalized_weights * losses).sum().backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
    optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_modules_that_are_put_in_between_calls_are_seen():
    model = plain_model()
    step = step_of(model, val_loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    step(**batch(0))
    model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    step(**batch(1))
    assert model[1][1].training
    model[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    step.weights(batch(2)["inputs"], batch(2)["labels"], val_inputs=batch(2)["val_inputs"])
    assert model[1][1].training


def test_a_selector_updates_its_optimizers_parameters_alone():
    selector = nn.ModuleDict({"a": nn.Embedding(CLASSES, 4), "b": nn.Linear(4, 1)}).double()
    selector.forward = lambda h, y, s: selector["b"](selector["a"](y) + h.sum(1, keepdim=True))
    model = plain_model()
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector["b"].parameters(), lr=0.05),
        online_features=False,
    )
    features = torch.randn(SIZE, 2, dtype=torch.float64, requires_grad=True)
    for seed in range(2):
        step(**batch(seed), features=features)
        assert selector["a"].weight.grad is None and features.grad is None


@pytest.mark.parametrize("kind", ["module", "partial", "lambda"])
def test_a_loss_module_is_found_wherever_it_is_carried(kind):
    import functools

    def call(module, logits, labels):
        return module(logits, labels)

    loss = RunningNorm()
    carried = {
        "module": loss,
        "partial": functools.partial(call, loss),
        "lambda": lambda logits, labels: loss(logits, labels),
    }[kind]
    plain, model = copy.deepcopy(loss), plain_model()
    step = step_of(model, loss=carried)
    given = batch(0)
    plain(model(given["inputs"]), given["labels"])
    step(**given)
    assert relative(loss.mean_norm, plain.mean_norm) < 1e-12


def test_an_engine_that_is_named_is_not_overridden_by_a_state():
    other, step = step_of(plain_model(), engine="double_backward"), step_of(plain_model())
    other(**batch(0))
    for engine in ("ghost", "forward_mode"):
        named = step_of(plain_model(), engine=engine)
        named.load_state_dict(other.state_dict())
        assert named(**batch(1)).engine == engine
    step.load_state_dict(other.state_dict())
    assert step(**batch(1)).engine == "double_backward"


def test_a_scaler_is_usable_after_a_step_that_was_undone():
    class Refusing(Base):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) + h @ (self.b.weight.T @ torch.eye(3).double()).roll(1, 0)

    step = step_of(Refusing(), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    failures = [KeyError]

    def once(*_):
        if failures:
            raise failures.pop()

    step.optimizer.register_step_pre_hook(once)
    with pytest.raises(KeyError):
        step(**batch(0))
    for seed in range(3):
        assert not step(**batch(seed)).skipped
    state = step.state_dict()
    off = step_of(plain_model(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    off(**batch(0))
    fresh = step_of(plain_model())
    fresh.load_state_dict(off.state_dict())
    assert fresh.scaler is None and state["scaler"]["scale"] == 8.0


class Decaying(Base):
    """A forward that shrinks a weight, in a way that version counters see or do not see."""

    def __init__(self, *, counted):
        super().__init__()
        self.counted = counted

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                (self.a.weight if self.counted else self.a.weight.data).mul_(0.9)
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("counted", [True, False])
def test_a_forward_that_writes_to_a_parameter(counted):
    model = Decaying(counted=counted)
    plain = copy.deepcopy(model)
    step = step_of(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        given = batch(seed)
        p = step(**given).normalized_weights
        losses = F.cross_entropy(plain(given["inputs"]), given["labels"], reduction="none")
        optimizer.zero_grad()
        (p * losses).sum().backward()
        optimizer.step()
        for name, parameter in plain.named_parameters():
            assert relative(model.get_parameter(name), parameter) < 1e-12, (seed, name)
