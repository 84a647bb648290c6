"""Sampled steps of models and losses of every kind: right, or refused by name."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models import CLASSES
from torch import nn
from torch.utils.checkpoint import checkpoint

import mts_fast

M = 12


class Net(nn.Module):
    """A body of 8 features and a head; subclasses change the forward."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh())


class ActivatedNorm(nn.BatchNorm1d):
    """Does more than normalise."""

    def forward(self, x):
        return nn.functional.gelu(super().forward(x))


class OwnNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm = ActivatedNorm(8)


class Unused(Net):
    """One BatchNorm is never run."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm1d(3)
        self.head = nn.Linear(8, CLASSES)


class TwoCalls(Net):
    def forward(self, x):
        h = self.norm(self.body(x)).tanh()
        return self.head(self.norm(h + 1).tanh())


class Checkpointed(Net):
    def forward(self, x):
        return self.head(
            checkpoint(lambda y: self.norm(self.body(y)).tanh(), x, use_reentrant=False)
        )


class Spectral(Net):
    """The power iteration of its weight is state that a forward writes and reads."""

    def __init__(self):
        super().__init__()
        self.body = nn.utils.spectral_norm(nn.Linear(4, 8))


class SpectralAlone(Spectral):
    def forward(self, x):
        return self.head(self.body(x).tanh())


class Counted(Net):
    """Reads a buffer that every forward moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.head(self.norm(self.body(x)).tanh() * (1 + 0.1 * self.count))


class Auxiliary(Net):
    """The last Linear is run, but its output is in no loss."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(8, 2)

    def forward(self, x):
        h = self.body(x).tanh()
        return {"logits": self.head(h), "auxiliary": self.auxiliary(h)}


class KeywordHead(Net):
    def forward(self, x):
        return self.head(input=self.body(x).tanh())


class PairLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class PairHead(Net):
    def __init__(self):
        super().__init__()
        self.head = PairLinear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh())[0]


class Scaled(nn.Module):
    """No Linear; its output has a part without axes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, CLASSES))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return {"logits": x.sin() @ self.weight, "scale": self.scale.exp()}


class Regression(nn.Module):
    """No Linear; one number per sample."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (x.sin() * self.weight).sum(1)


class InRecord(Net):
    def forward(self, x):
        return SimpleNamespace(scores=self.head(self.body(x).tanh()))


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def writes(output, labels):
    output -= 1
    return cross_entropy(output * 2, labels)


LOSSES = {
    Scaled: lambda output, labels: cross_entropy(output["logits"] * output["scale"], labels),
    Regression: lambda output, labels: (output - labels).square(),
    InRecord: lambda output, labels: cross_entropy(output.scores, labels),
}


def step_of(model, compute, **options):
    torch.manual_seed(3)
    selector = mts_fast.Selector(2, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.SGD(selector.parameters(), lr=0.1),
        online_features=False,
        compute=compute,
        **options,
    )


def call(step, seed=0, inputs=None, size=M):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=g).double() if inputs is None else inputs
    val = torch.randn(6, 4, generator=g).double()
    return step(
        x,
        torch.arange(size) % CLASSES,
        features=torch.randn(size, 2, generator=g).double(),
        val_inputs=val,
        val_labels=torch.arange(6) % CLASSES,
    )


class Plain(nn.Module):
    """No Linear; its output is the logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x):
        return x.sin() @ self.weight


def moved(model, compute, **options):
    """Parameters and buffers of model and selector after three steps."""
    if type(model) is Checkpointed:
        options["validation_mode"] = "train"
    step = step_of(copy.deepcopy(model), compute, **options)
    for seed in range(3):
        call(step, seed)
    # checkpointing moves running statistics a second time, in the backward of an exact step
    of_model = dict(step.model.named_parameters() if type(model) is Checkpointed else {})
    of_model = of_model or step.model.state_dict()
    tensors = [t.detach() for t in (*of_model.values(), *step.selector.state_dict().values())]
    return torch.cat([t.double().flatten() for t in tensors])


@pytest.mark.parametrize(
    "kind",
    [
        *(Net, OwnNorm, Unused, TwoCalls, Checkpointed, Spectral, SpectralAlone, Counted),
        *(Auxiliary, KeywordHead, PairHead, Scaled, Regression, InRecord),
    ],
)
def test_all_candidates_computed_is_the_exact_step(kind):
    torch.manual_seed(0)
    model, loss = kind().double(), LOSSES.get(kind)
    exact, sampled = (moved(model, compute, loss=loss) for compute in (None, M))
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-10)
    moved(model, 5, loss=loss)


@pytest.mark.parametrize("engine", ["double_backward", "finite_difference"])
def test_checkpointed_batchnorm_by_engines(engine):
    torch.manual_seed(0)
    model = Checkpointed().double()
    exact, sampled = (moved(model, compute, engine=engine) for compute in (None, M))
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-6)


def test_a_loss_may_write_to_the_output():
    model = Plain().double()
    exact, sampled = (moved(model, compute, loss=writes) for compute in (None, M))
    torch.testing.assert_close(sampled, exact, rtol=0, atol=1e-10)


def test_batchnorm_of_a_large_mean_keeps_its_digits():
    """Moments of parts are joined, and the variance is centred, without cancellation."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    x = torch.randn(64, 4) + 2000

    def gradient(compute, dtype):
        model = copy.deepcopy(base).to(dtype)
        step = step_of(model, compute)
        step.selector.to(dtype)
        step(
            x.to(dtype),
            torch.arange(64) % CLASSES,
            features=x[:, :2].to(dtype) - 2000,
            val_inputs=x[:6].to(dtype),
            val_labels=torch.arange(6) % CLASSES,
        )
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    truth = gradient(None, torch.float64)
    exact = float((gradient(None, torch.float32) - truth).norm())
    sampled = float((gradient(64, torch.float32) - truth).norm())
    assert sampled < 10 * exact  # observed: 1.1 times; 500 times with E[x^2] - m^2


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_few_computed_samples_move_the_selector(k):
    torch.manual_seed(0)
    step = step_of(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double(), k)
    result = call(step)
    assert float(result.dots.std()) > 0
    if k > 1:
        assert result.sampling.read()["variance"] > 0


class Coupled(Net):
    def __init__(self, p):
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.norm = nn.Identity()

    def forward(self, x):
        h = self.body(x)
        return self.head(self.dropout((h - h.mean(0)).tanh()))


@pytest.mark.parametrize(("p", "k"), [(0.3, 4), (0.0, 1), (0.0, 5)])
def test_samples_that_act_on_each_other_are_refused(p, k):
    with pytest.raises(RuntimeError, match="model must be one whose samples do not act on each"):
        call(step_of(Coupled(p).double(), k))


class Packed(Net):
    def forward(self, x):
        h = self.body(x)
        rows = torch.cat([h, h[:1]])
        return self.head(self.norm(rows)[: len(x)].tanh())


class Sometimes(Net):
    """Runs its BatchNorm in every second forward."""

    forwards = 0

    def forward(self, x):
        self.forwards += 1
        h = self.body(x)
        return self.head((self.norm(h) if self.forwards % 2 == 0 else h).tanh())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Packed, r"model must be one with as many rows for each sample, got 6 rows of 5 samples"),
        (Sometimes, "model must be one that runs the same BatchNorm layers in every forward"),
    ],
)
def test_batchnorm_that_no_sample_can_be_told_in_is_refused(kind, message):
    with pytest.raises(RuntimeError, match=message):
        call(step_of(kind().double(), 5))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x, names):
        return self.head(x) + torch.tensor([len(name) for name in names])[: len(x), None]


@pytest.mark.parametrize("names", [["a"] * M, ("b",) * M])
def test_inputs_that_cannot_be_taken_apart_are_refused(names):
    step = step_of(Named().double(), 4)
    inputs = {"x": torch.randn(M, 4).double(), "names": names}
    with pytest.raises(TypeError, match=rf"inputs must be made of tensors.* of {M}; pass tensors"):
        call(step, inputs=inputs)


@pytest.mark.parametrize("saved", [[1], {"share": "x"}, {"calls": 1, "other": 2}])
def test_a_damaged_state_is_refused(saved):
    step = step_of(Net().double(), "auto")
    state = copy.deepcopy(step.state_dict())
    state["compute"] = saved
    with pytest.raises(TypeError, match=r"state\['compute'\] must be as saved"):
        step.load_state_dict(state)


def test_a_failed_call_leaves_the_choice_of_auto():
    step = step_of(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES)).double(), "auto")
    for seed in range(7):
        call(step, seed, size=64)
    before = repr(step.state_dict()["compute"])
    with pytest.raises(ValueError, match="must be finite"):
        call(step, inputs=torch.full((64, 4), torch.nan).double(), size=64)
    assert repr(step.state_dict()["compute"]) == before
