"""explain_engine names every parameter and reason; check_engine finds right and wrong engines."""

import re
import types

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, snapshot
from models import make_case
from torch import nn
from torch.utils.checkpoint import checkpoint

import mts_fast
from mts_fast.hypergradient import ENGINES
from mts_fast.hypergradient.ghost.rules import LayerRule, _rules

X, Y = torch.linspace(-1, 1, 24).view(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def uses(model, inputs=X, labels=Y):
    return {p.path: p.seen_as for p in mts_fast.explain_engine(model, inputs, labels).parameters}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {n: "linear" for n in ("0.weight", "0.bias", "2.weight", "2.bias")}),
        (
            "tied",
            {"embed.weight": "embedding, linear", "mix.weight": "linear", "mix.bias": "linear"},
        ),
        ("partly_frozen", {n: "linear" for n in ("0.bias", "2.weight", "2.bias")}),
    ],
)
def test_uses_of_parameters(name, expected, device):
    case = make_case(name, device)
    assert uses(case.model, case.inputs, case.labels) == expected


def test_bare_parameters_and_repeated_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x + self.shift))

    assert uses(Model()) == {
        "shift": "add",
        "layer.weight": "linear x2",
        "layer.bias": "linear x2",
    }


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return F.linear(x, self.layer.weight.sin(), self.layer.bias)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)
        return self.head(x.tanh())


class SequenceFirst(nn.Module):
    """The batch is the second axis inside."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.unflatten(1, (2, 2)).repeat(1, 1, 2).transpose(0, 1))[0])


class Positions(nn.Module):
    """GPT-2's way to learned positions, and an embedding of one index per sample."""

    def __init__(self):
        super().__init__()
        self.positions, self.kinds = nn.Embedding(20, 4), nn.Embedding(3, 4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        steps = x[:, :1, None] * torch.ones(12, 4, device=x.device, dtype=x.dtype)
        kinds = self.kinds((x[:, 0] > 0).long())[:, None]
        steps = steps + self.positions(torch.arange(12, device=x.device)) + kinds
        return self.head(self.mix(steps).tanh().mean(1))


@pytest.mark.parametrize("size", [5, 12, 30])  # 12 samples: an index that could be either
def test_as_many_positions_as_samples(size, device):
    x, y = torch.randn(size, 4, device=device), torch.arange(size, device=device) % 3
    model = Positions().to(device)
    assert mts_fast.explain_engine(model, x, y).choice == "ghost"
    check = mts_fast.check_engine(model, x, y)
    assert check.ok and check.dots["ghost"] < 1e-12, str(check)


def batchnorm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def bare_batchnorm():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))


def patched_but_right():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].forward = types.MethodType(
        lambda self, x: 2 * F.linear(x, self.weight, self.bias), model[0]
    )
    return model


def lstm():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(x.unflatten(1, (2, 2)))[0][:, -1])

    return Model()


# how each is made, what ghost says, and the engine that serves it
REFUSED = {
    "batchnorm": (
        batchnorm,
        "1: BatchNorm1d in train mode mixes the samples of a batch",
        "forward_mode",
    ),
    "bare_batchnorm": (
        bare_batchnorm,
        "1: BatchNorm1d in train mode mixes the samples",
        "forward_mode",
    ),
    "lstm": (lstm, "rnn.weight_ih_l0.* is used by lstm", "double_backward"),
    "checkpoint": (lambda: Checkpointed(True), "re-entrant activation checkpointing", "none"),
    "compiled": (
        lambda: torch.compile(nn.Linear(4, 3), backend="eager"),
        "the model: compiled by torch.compile",
        "forward_mode",
    ),
}
SERVED = {
    "batchnorm_in_eval_mode": lambda: batchnorm().eval(),
    "patched_but_right": patched_but_right,
    "sine": Sine,
    "checkpoint": lambda: Checkpointed(False),
    "sequence_first": SequenceFirst,
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_and_their_reasons(case, device):
    build, reason, choice = REFUSED[case]
    model = build().to(device)
    explanation = mts_fast.explain_engine(model, X.to(device), Y.to(device))
    assert explanation.choice == choice
    assert choice == "none" or explanation.reasons[choice] == []
    assert any(re.search(reason, why) for why in explanation.reasons["ghost"]), explanation.reasons[
        "ghost"
    ]
    assert f"engine='auto' takes {choice}" in str(explanation)


@pytest.mark.parametrize("case", SERVED)
def test_served_models_are_exact(case, device):
    model, x, y = SERVED[case]().to(device), X.to(device), Y.to(device)
    assert mts_fast.explain_engine(model, x, y).choice == "ghost"
    check = mts_fast.check_engine(model, x, y)
    assert check.ok, str(check)
    assert check.dots["ghost"] < 1e-12 and check.gradients["ghost"] < 1e-12  # observed 1e-15


def test_without_a_batch_only_what_shows_without():
    explanation = mts_fast.explain_engine(batchnorm())
    assert explanation.choice == "forward_mode" and not explanation.with_batch
    assert "what a forward shows is not known" in str(explanation)
    assert {p.path: p.seen_as for p in explanation.parameters}["1.weight"] == "in BatchNorm1d"
    assert mts_fast.explain_engine(Sine()).choice == "ghost"


def test_forward_mode_reasons_are_told(device):
    explanation = mts_fast.explain_engine(lstm().to(device))
    assert explanation.reasons["forward_mode"] == ["rnn is a LSTM, whose weights cannot be swapped"]


@pytest.mark.parametrize("name", ["mlp", "batchnorm_cnn", "dropout_mlp", "transformer", "lstm"])
def test_check_serves_every_model(name, device):
    case = make_case(name, device, torch.float32)
    check = mts_fast.check_engine(case.model, case.inputs, case.labels)
    assert check.ok, str(check)
    assert check.dots["finite_difference"] < 1e-6  # smooth models; observed 4e-9
    served = {name for name, error in check.dots.items() if error is not None}
    assert set(check.refusals) == set(ENGINES) - served


def test_check_finds_a_wrong_rule(device, monkeypatch):
    """A layer registered as linear in its weight, which it is not."""

    def squared(x, weight):
        if (
            torch.overrides.has_torch_function((x, weight))
            or torch.overrides._len_torch_function_stack()
        ):
            return torch.overrides.handle_torch_function(squared, (x, weight), x, weight)
        return F.linear(x, weight**2)

    monkeypatch.setitem(_rules, squared, LayerRule(squared, {"weight": 1}))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 4) + 1)

        def forward(self, x):
            return squared(x, self.weight)

    check = mts_fast.check_engine(Model().to(device), X.to(device), Y.to(device))
    assert not check.ok
    assert check.dots["ghost"] > 0.1 and check.dots["forward_mode"] < 1e-12


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.layer = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.layer(x, self.body(x).tanh())


def test_a_layer_registered_by_the_user(device, monkeypatch):
    model, x, y = Bilinear().to(device), X.to(device), Y.to(device)
    assert mts_fast.explain_engine(model, x, y).choice == "ghost"  # by torch's own derivatives
    # what monkeypatch sets it also takes back
    monkeypatch.setitem(_rules, F.bilinear, None)
    mts_fast.hypergradient.register_layer(F.bilinear, {"weight": 2, "bias": 3})
    assert mts_fast.explain_engine(model, x, y).choice == "ghost"
    check = mts_fast.check_engine(model, x, y)
    assert check.ok and check.dots["ghost"] < 1e-12, str(check)


def test_nothing_is_left_behind(device):
    case = make_case("norm_and_dropout", device)
    before = snapshot(module=case.model, device=device, gradients=True)
    mts_fast.explain_engine(case.model, case.inputs, case.labels)
    mts_fast.check_engine(case.model, case.inputs, case.labels)
    assert_bitwise(snapshot(module=case.model, device=device, gradients=True), before)


def test_loss_that_mixes_samples():
    def mixing(output, labels):
        losses = F.cross_entropy(output, labels, reduction="none")
        return losses / losses.sum()

    explanation = mts_fast.explain_engine(nn.Linear(4, 3), X, Y, loss=mixing)
    assert explanation.reasons["ghost"] == [
        "weight: samples are mixed in, or after, the layer that uses it"
    ]
    assert explanation.choice == "forward_mode"


def test_errors_name_the_argument():
    frozen = nn.Linear(4, 3).requires_grad_(False)
    for function in (mts_fast.explain_engine, mts_fast.check_engine):
        with pytest.raises(ValueError, match="model must be given trainable parameters"):
            function(frozen, X, Y)
        with pytest.raises(TypeError, match="the model's output must be logits"):
            function(_Integers(), X, Y)
        with pytest.raises(ValueError, match=r"loss\(output, labels\) must be a tensor of shape"):
            function(nn.Linear(4, 3), X, Y, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="inputs and labels must be both given"):
        mts_fast.explain_engine(frozen, X)


class _Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.long()
