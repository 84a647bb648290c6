"""Training dynamics of a pool against a loop over its samples, and the counter of forgetting."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, relative, snapshot
from models import CLASSES, batchnorm_cnn, dropout_mlp, mlp, norm_and_dropout, partly_frozen
from torch import nn

from mts_fast import reference
from mts_fast.features import ForgettingCounter, training_dynamics

N = 11


class TokenClassifier(nn.Module):
    """Tokens [N, T] through attention to logits [N, C]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens)).mean(1))


# dense; one parameter that does not learn; convolutions and statistics; masks that eval mode
# switches off; attention over integers.
MODELS = {
    "mlp": (mlp, (4,)),
    "partly_frozen": (partly_frozen, (4,)),
    "batchnorm_cnn": (batchnorm_cnn, (2, 6, 6)),
    "dropout_mlp": (dropout_mlp, (4,)),
    "norm_and_dropout": (norm_and_dropout, (4,)),
    "tokens": (TokenClassifier, None),
}


def make(name, device, dtype=torch.float64):
    build, shape = MODELS[name]
    g = torch.Generator().manual_seed(2)
    if shape is None:
        inputs = torch.randint(9, (N, 5), generator=g)
    else:
        inputs = torch.randn(N, *shape, generator=g, dtype=dtype)
    labels = torch.randint(CLASSES, (N,), generator=g)
    return build().to(device, dtype).train(), inputs.to(device), labels.to(device)


def one_at_a_time(model, inputs, labels):
    """Columns by a loop over the samples with plain autograd, in eval mode."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rows = {"loss": [], "gradient_norm": [], "error_norm": []}
    was = model.training
    model.eval()
    for x, y in zip(inputs, labels, strict=True):
        logits = model(x[None])[0]
        loss = F.cross_entropy(logits, y)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable)])
        target = torch.zeros_like(logits)
        target[y] = 1
        rows["loss"].append(loss.detach())
        rows["gradient_norm"].append(gradient.norm())
        rows["error_norm"].append((logits.softmax(0) - target).norm().detach())
    model.train(was)
    return {name: torch.stack(values)[:, None] for name, values in rows.items()}


# torch says that its fused attention is not vectorised over samples
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_size", [1, 4, 64])  # single; with a remainder; all at once
@pytest.mark.parametrize("name", MODELS)
def test_columns_equal_a_loop(name, batch_size, device):
    model, inputs, labels = make(name, device)
    before = snapshot(module=model, device=device, gradients=True)
    found = training_dynamics(model, inputs, labels, batch_size=batch_size)
    assert_bitwise(snapshot(module=model, device=device, gradients=True), before)
    expected = one_at_a_time(model, inputs, labels)
    assert set(found) == set(expected)
    for column, truth in expected.items():
        assert relative(found[column], truth) < 1e-13, column  # observed 4e-16


def test_float32_is_as_exact_as_the_loop(device):
    model, inputs, labels = make("batchnorm_cnn", device)
    truth = one_at_a_time(model, inputs, labels)
    model.float()
    found = training_dynamics(model, inputs.float(), labels)
    loop = one_at_a_time(model, inputs.float(), labels)
    for column, exact in truth.items():
        # floor: a few roundings; observed 1.2e-7
        assert relative(found[column], exact) <= 2 * relative(loop[column], exact) + 5e-7, column


def test_without_gradient_norm(device):
    model, inputs, labels = make("mlp", device)
    everything = training_dynamics(model, inputs, labels)
    for p in model.parameters():
        p.requires_grad_(False)
    found = training_dynamics(model, inputs, labels, gradient_norm=False)
    assert set(found) == {"loss", "error_norm"}
    assert_bitwise(found, {name: everything[name] for name in found})


def test_modes_of_frozen_modules_are_kept(device):
    model, inputs, labels = make("norm_and_dropout", device)
    model[1].eval()
    training_dynamics(model, inputs, labels)
    assert [m.training for m in model] == [True, False, *[True] * 6]


X, Y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3


def broken(rows):
    x = X.clone()
    x[rows] = torch.nan
    return x


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.tolist(), Y), {}, TypeError, "inputs must be a tensor"),
        ((X[:0], Y[:0]), {}, ValueError, "inputs must be non-empty"),
        ((X, Y.float()), {}, TypeError, "labels must be an integer"),
        ((X, Y[:3]), {}, ValueError, "labels must be of length 4"),
        ((X, Y + 1), {}, ValueError, r"labels must be in \[0, 3\)"),
        ((X, Y), {"batch_size": 0}, ValueError, "batch_size must be a positive int"),
        ((broken([1, 3]), Y), {}, ValueError, r"loss of every sample must .* 2 rows \(1, 3\)"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    model = mlp()
    before = snapshot(module=model, gradients=True)
    with pytest.raises(error, match=message):
        training_dynamics(model, *arguments, **options)
    assert_bitwise(snapshot(module=model, gradients=True), before)


def test_frozen_model_is_refused():
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="model must be given trainable parameters"):
        training_dynamics(model, X, Y)


def random_history(n=9, epochs=12):
    return torch.rand(epochs, n, generator=torch.Generator().manual_seed(4)) < 0.5


def test_counter_in_parts_equals_reference_on_the_history(device):
    """In each epoch the samples come shuffled, in parts, and some of the integers narrow."""
    history = random_history().to(device)
    counter = ForgettingCounter(9, device)
    for epoch, correct in enumerate(history):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(epoch)).to(device)
        for part in order.split(4):
            counter.update(part.to(torch.int32), correct[part].int())
    counts, never = reference.forgetting(history)
    assert torch.equal(counter.counts, counts) and torch.equal(counter.never_correct, never)
    columns = counter.columns()
    assert torch.equal(columns["forgetting_counts"], counts[:, None].float())
    assert torch.equal(columns["never_correct"], never[:, None].float())


def test_samples_seen_at_different_times():
    """A sample is compared with its own last prediction, however long ago."""
    counter = ForgettingCounter(3)
    for indices, correct in (
        ([0, 1], [1, 1]),
        ([1], [0]),
        ([2], [0]),
        ([0, 1], [0, 1]),
        ([1], [0]),
    ):
        counter.update(torch.tensor(indices), torch.tensor(correct))
    assert counter.counts.tolist() == [1, 2, 0]
    assert counter.never_correct.tolist() == [False, False, True]


def test_counter_resumes():
    history = random_history()
    whole, first, second = (ForgettingCounter(9) for _ in range(3))
    everyone = torch.arange(9)
    for correct in history[:5]:
        first.update(everyone, correct)
    second.load_state_dict(first.state_dict())
    for correct in history:
        whole.update(everyone, correct)
    kept = first.state_dict()
    for correct in history[5:]:
        second.update(everyone, correct)
    assert_bitwise(second.state_dict(), whole.state_dict())
    # the two counters share nothing
    assert_bitwise(first.state_dict(), kept)
    with pytest.raises(ValueError, match="state must be of 4 samples, got 9"):
        ForgettingCounter(4).load_state_dict(whole.state_dict())


TWO = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("indices", "correct", "error", "message"),
    [
        (TWO.float(), TWO, TypeError, "indices must be an integer"),
        (TWO[None], TWO, ValueError, "indices must be 1-dim"),
        (TWO, TWO[:1], ValueError, "correct must be of length 2"),
        (TWO, [True, False], TypeError, "correct must be a tensor"),
        (TWO + 2, TWO, ValueError, r"indices must be in \[0, 3\)"),
        (TWO - 1, TWO, ValueError, r"indices must be in \[0, 3\)"),
        (TWO * 0, TWO, ValueError, "indices must be distinct"),
    ],
)
def test_refused_updates_count_nothing(indices, correct, error, message):
    counter = ForgettingCounter(3)
    counter.update(torch.arange(3), torch.ones(3))
    before = counter.state_dict()
    with pytest.raises(error, match=message):
        counter.update(indices, correct)
    assert_bitwise(counter.state_dict(), before)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_refused_sizes(size, error):
    with pytest.raises(error, match="num_samples must be a positive int"):
        ForgettingCounter(size)
