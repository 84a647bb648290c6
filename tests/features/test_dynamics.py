"""Training dynamics of a pool against a loop over its samples."""

import types

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, relative, snapshot
from models import CLASSES, batchnorm_cnn, dropout_mlp, mlp, norm_and_dropout, partly_frozen
from torch import nn

from mts_fast.features import training_dynamics

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


# dense; one frozen parameter; convolutions with BatchNorm; dropout, which eval mode switches off;
# attention over tokens.
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
    columns = training_dynamics(model, inputs, labels, batch_size=batch_size)
    assert_bitwise(snapshot(module=model, device=device, gradients=True), before)
    expected = one_at_a_time(model, inputs, labels)
    assert set(columns) == set(expected)
    for column, truth in expected.items():
        assert relative(columns[column], truth) < 1e-13, column  # observed 4e-16


def test_float32_is_as_exact_as_the_loop(device):
    model, inputs, labels = make("batchnorm_cnn", device)
    truth = one_at_a_time(model, inputs, labels)
    model.float()
    columns = training_dynamics(model, inputs.float(), labels)
    loop = one_at_a_time(model, inputs.float(), labels)
    for column, exact in truth.items():
        # floor: a few roundings; observed 1.2e-7
        assert relative(columns[column], exact) <= 2 * relative(loop[column], exact) + 5e-7, column


def test_without_gradient_norm(device):
    model, inputs, labels = make("mlp", device)
    everything = training_dynamics(model, inputs, labels)
    for p in model.parameters():
        p.requires_grad_(False)
    columns = training_dynamics(model, inputs, labels, gradient_norm=False)
    assert set(columns) == {"loss", "error_norm"}
    assert_bitwise(columns, {name: everything[name] for name in columns})


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
        ((X.tolist(), Y), {}, TypeError, "inputs must be a tensor, or a tuple, list or dict"),
        ((None, Y), {}, TypeError, "inputs must be a tensor, or a tuple, list or dict of tensors"),
        ((X.to_sparse(), Y), {}, TypeError, "inputs must be dense tensors"),
        ((X.to("meta"), Y), {}, ValueError, "inputs must be on a device that holds values"),
        (((X, X[:3]), Y), {}, ValueError, "labels must be of length 3"),
        ((X, Y.to("meta")), {}, ValueError, "labels must be on cpu like inputs"),
        ((X, None), {}, TypeError, "labels must be a tensor"),
        ((X, Y - 1), {}, ValueError, r"labels must be in \[0, 3\), .*; the model's output has 3"),
        ((X, Y - 100), {}, ValueError, r"labels must be in \[0, 3\), got values from -100 to -98"),
        ((X, Y[:, None, None]), {}, ValueError, r"labels must be \[N\] or \[N, T\]"),
        ((X, Y[:, None]), {}, ValueError, r"the model's output must be \[4, 1, C\], got \(4, 3\)"),
        ((X, Y), {"loss": "mse"}, TypeError, "loss must be callable"),
        ((X, Y), {"batch_size": 2.0}, TypeError, "batch_size must be a positive int"),
        ((X, Y), {"gradient_norm": "no"}, TypeError, "gradient_norm must be True or False"),
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


class Spoken(nn.Module):
    """Inputs and outputs as in other libraries: two inputs, logits beside other outputs."""

    def __init__(self, answer):
        super().__init__()
        self.body, self.answer = mlp(), answer

    def forward(self, values, scale):
        return self.answer(self.body(values * scale))


ANSWERS = {
    "tensor": lambda z: z,
    "mapping": lambda z: {"loss": None, "logits": z},
    "attribute": lambda z: types.SimpleNamespace(logits=z),
}
SCALE = torch.tensor([[2.0], [1.0], [0.5], [3.0]])


@pytest.mark.parametrize("inputs", [(X, SCALE), [X, SCALE], {"scale": SCALE, "values": X}])
@pytest.mark.parametrize("answer", ANSWERS)
def test_everything_that_the_step_takes(answer, inputs):
    model = Spoken(ANSWERS[answer])
    columns = training_dynamics(model, inputs, Y, batch_size=3)
    expected = one_at_a_time(model.body, X * SCALE, Y)
    for column, truth in expected.items():
        assert relative(columns[column], truth) < 1e-6, column  # observed 1e-7


def test_sequences_equal_a_loop_over_their_positions():
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3)).double()
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(9, (4, 6), generator=g), torch.randint(3, (4, 6), generator=g)
    labels[0, 2:], labels[2, 0] = -100, -100
    columns = training_dynamics(model, tokens, labels, batch_size=3)
    for i, (x, y) in enumerate(zip(tokens, labels, strict=True)):
        counted = y >= 0
        logits = model(x)[counted]
        loss = F.cross_entropy(logits, y[counted])
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        expected = {
            "loss": loss,
            "gradient_norm": torch.cat([v.flatten() for v in gradient]).norm(),
            "error_norm": (logits.softmax(1) - F.one_hot(y[counted], 3)).norm(dim=1).mean(),
        }
        for column, truth in expected.items():
            assert columns[column][i].item() == pytest.approx(truth.item(), rel=1e-12), column
    labels[3] = -100
    with pytest.raises(ValueError, match=r"such that every sample has one .* none in rows \[3\]"):
        training_dynamics(model, tokens, labels)


def smoothed(output, labels):
    return F.cross_entropy(output, labels, reduction="none", label_smoothing=0.2)


def squared(output, labels):
    return (output - labels[:, None]).square().mean(1)


# class labels, whose error norm does not depend on the loss; real targets; integers outside the
# classes
@pytest.mark.parametrize(
    ("loss", "labels", "has_error_norm"),
    [(smoothed, Y, True), (squared, Y / 3, False), (squared, Y + 1, False)],
)
def test_losses_of_the_callers_own(loss, labels, has_error_norm):
    model = mlp()
    columns = training_dynamics(model, X, labels, loss=loss, batch_size=3)
    assert set(columns) == {"loss", "gradient_norm"} | ({"error_norm"} if has_error_norm else set())
    for i in range(4):
        value = loss(model(X[i : i + 1]), labels[i : i + 1])[0]
        gradient = torch.autograd.grad(value, list(model.parameters()))
        assert columns["loss"][i].item() == pytest.approx(value.item(), rel=1e-6)
        norm = torch.cat([g.flatten() for g in gradient]).norm().item()
        assert columns["gradient_norm"][i].item() == pytest.approx(norm, rel=1e-5)
    if has_error_norm:
        assert_bitwise(columns["error_norm"], training_dynamics(model, X, Y)["error_norm"])


def test_whether_gradients_are_enabled_does_not_matter():
    model = mlp()
    expected = training_dynamics(model, X, Y)
    with torch.no_grad():
        assert_bitwise(training_dynamics(model, X, Y), expected)
    assert not any(column.requires_grad for column in expected.values())
    with torch.inference_mode():
        made = X.clone()
        message = (
            r"gradient_norm must be False in torch\.inference_mode\(\), got True; call it outs"
        )
        with pytest.raises(RuntimeError, match=message):
            training_dynamics(model, X, Y)
        columns = training_dynamics(model, made, Y, gradient_norm=False)
        assert_bitwise(columns["loss"].clone(), expected["loss"])
    with pytest.raises(ValueError, match=r"got tensors made in torch\.inference_mode\(\); clone"):
        training_dynamics(model, made, Y)


def test_outputs_without_logits_are_refused():
    model = Spoken(lambda z: (z, z))
    with pytest.raises(TypeError, match="the model's output must be logits, got t"):
        training_dynamics(model, (X, SCALE), Y)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        training_dynamics(None, X, Y)


def test_gradients_that_are_not_finite_name_their_rows():
    """The loss of sample 2 is 0, where the derivative of the square root is infinite."""
    loss = lambda output, labels: output.square().sum(1).mul(labels).sqrt()  # noqa: E731
    labels = torch.tensor([1.0, 2.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"gradient_norm of every sample must be .* 1 rows \(2\)"):
        training_dynamics(mlp(), X, labels, loss=loss)


def test_frozen_model_is_refused():
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="model must be given trainable parameters"):
        training_dynamics(model, X, Y)
