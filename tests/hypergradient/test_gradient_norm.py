"""Norms of per-sample gradients equal those of one sample at a time, on every layer and model."""

import logging

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot
from models import make_case
from test_ghost import CASES, LAYERS, Functional, noise
from test_ghost import make as make_ghost_case
from torch import nn

import mts_fast
from mts_fast.hypergradient import GradientNorm, LabelledBatch, Objective
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.ghost.parts import OuterPart, ScatteredPart, inner
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms

EXACT = 1e-12  # float64; observed 2e-15


def one_at_a_time(model, batch):
    """The truth: a batch of one sample, one backward."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = []
    for one in batch.split(1):
        loss = Objective(model).losses(one).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms.append(
            torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        )
    return torch.stack(norms)


def by_ghost(model, batch):
    """Without the way out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return gradient_norms(Ghost(Objective(model), parameters), batch)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name):
    torch.manual_seed(4)
    model, shape = LAYERS[name]()
    model(torch.randn(2, *shape))
    model.double()
    batch = LabelledBatch(torch.randn(6, *shape).double(), torch.randint(5, (6,)))
    assert relative(by_ghost(model, batch), one_at_a_time(model, batch)) < EXACT


@pytest.mark.parametrize("case", list(CASES))
def test_whole_models(case):
    """In-place activations, class token and layer scale, attention, a matrix used three times."""
    objective, _, x, y = make_ghost_case(case)
    batch = LabelledBatch(x, y)
    norms = by_ghost(objective.model, batch)
    assert relative(norms, one_at_a_time(objective.model, batch)) < EXACT


@pytest.mark.parametrize("name", ["mlp", "transformer", "tied", "dict_inputs", "partly_frozen"])
def test_kinds_of_inputs_and_labels(name, device):
    case = make_case(name, device)
    batch = LabelledBatch(case.inputs, case.labels)
    assert relative(by_ghost(case.model, batch), one_at_a_time(case.model, batch)) < EXACT


def test_batchnorm_in_eval_mode(device):
    case = make_case("batchnorm_cnn", device)
    case.model.eval()
    batch = LabelledBatch(case.inputs, case.labels)
    assert relative(by_ghost(case.model, batch), one_at_a_time(case.model, batch)) < EXACT


def test_functions_of_parameters():
    model, batch = Functional().double(), noise()
    assert relative(by_ghost(model, batch), one_at_a_time(model, batch)) < EXACT


class Language(nn.Module):
    """Token and position embeddings as in GPT-2; a padding token; the head is the table."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, padding_idx=0), nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        at = torch.arange(x.shape[1], device=x.device)[None]
        hidden = self.mix(self.tokens(x) + self.positions(at)).tanh()
        return hidden @ self.tokens.weight.T


def test_embeddings_of_tokens_and_positions():
    model = Language().double()
    tokens = torch.tensor([[1, 1, 0, 3], [2, 0, 2, 2], [5, 6, 1, 4]])
    batch = LabelledBatch(tokens, tokens.flip(1))
    assert relative(by_ghost(model, batch), one_at_a_time(model, batch)) < EXACT
    check = mts_fast.check_engine(model, batch.inputs, batch.labels)
    # differences see the padding row move, to which autograd gives no gradient in the embedding
    assert check.dots["ghost"] < EXACT and check.dots["finite_difference"] > 1e-3, str(check)


@pytest.mark.parametrize("positions", [1, 3, 40])  # a product; Gram matrices; the gradient itself
def test_outer_forms_agree(positions):
    part = OuterPart(torch.randn(4, positions, 5).double(), torch.randn(4, positions, 6).double())
    assert relative(part.squares(), part.dense().square().sum(1)) < EXACT
    assert relative(inner(part, part), part.dense().square().sum(1)) < EXACT


def test_inner_products_of_unlike_parts():
    outer = OuterPart(torch.randn(4, 3, 5).double(), torch.randn(4, 3, 6).double())
    rows = ScatteredPart(torch.randint(5, (4, 2)), torch.randn(4, 2, 6).double(), 5)
    expected = (outer.dense() * rows.dense()).sum(1)
    assert relative(inner(outer, rows), expected) < EXACT
    assert relative(inner(rows, outer), expected) < EXACT
    assert relative(rows.squares(), rows.dense().square().sum(1)) < EXACT


def test_an_lstm_goes_another_way_and_says_so(device, caplog):
    case = make_case("lstm", device)
    case.model.eval()
    batch = LabelledBatch(case.inputs, case.labels)
    with caplog.at_level(logging.INFO, "mts_fast"):
        norms = GradientNorm(Objective(case.model))(batch)
    assert "gradient norms: one sample at a time, since ghost cannot: lstm." in caplog.text
    assert relative(norms, one_at_a_time(case.model, batch)) < EXACT


def test_weights_made_of_parameters_are_taken_apart(caplog):
    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 5)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight.sin(), self.layer.bias)

    model, batch = Sine().double(), noise()
    with caplog.at_level(logging.INFO, "mts_fast"):
        norms = GradientNorm(Objective(model))(batch)
    assert "one sample at a time" not in caplog.text
    assert relative(norms, one_at_a_time(model, batch)) < EXACT


def test_no_trace(device):
    case = make_case("transformer", device)
    before = snapshot(module=case.model, device=device, gradients=True)
    GradientNorm(Objective(case.model))(LabelledBatch(case.inputs, case.labels))
    assert_bitwise(snapshot(module=case.model, device=device, gradients=True), before)
