"""Online features against a loop over pairs, their standardisation, and where they are taken."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, relative
from torch import nn

from mts_fast.features import OnlineStandardizer, PenultimateFeatures, online_features


def activations(device, b=6, v=5, d=4):
    g = torch.Generator().manual_seed(0)
    x, val = (torch.randn(n, d, generator=g, dtype=torch.float64).to(device) for n in (b, v))
    return x, val


@pytest.mark.parametrize("k", [1, 3, 5])  # least, the paper's, the whole validation batch
def test_online_features_equal_a_loop(k, device):
    x, val = activations(device)
    x[2] = 0  # a dead sample has cosine 0 to everything
    x[3] = 7 * val[1]  # a multiple of a validation sample has cosine 1
    nearest, centroid = online_features(x, val, k=k)
    for i, row in enumerate(x):
        cosines = torch.stack([F.cosine_similarity(row, other, dim=0) for other in val])
        expected = cosines.sort(descending=True).values[:k]
        torch.testing.assert_close(nearest[i], expected, rtol=0, atol=1e-14)  # observed 2e-16
        mean = F.cosine_similarity(row, val.mean(0), dim=0)
        torch.testing.assert_close(centroid[i, 0], mean, rtol=0, atol=1e-14)
    assert nearest[2].abs().max() == 0 and centroid[2] == 0


# squares vanish, or overflow; powers of two, so that the numbers themselves stay the same.
@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float16, 12), (torch.float32, -100), (torch.float32, 120), (torch.float64, -1000)],
)
def test_online_features_do_not_depend_on_the_scale(dtype, power, device):
    x, val = (t.to(dtype) for t in activations(device))
    x[2] = 0
    expected = online_features(x, val)
    factor = torch.tensor(2.0, dtype=torch.float64).pow(power)
    scaled = [(t.double() * factor).to(dtype) for t in (x, val)]
    assert_bitwise(online_features(*scaled), expected)


X, V = torch.randn(6, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), V), {}, TypeError, "features must be a floating"),
        ((X[0], V), {}, ValueError, "features must be 2-dim"),
        ((X, V.tolist()), {}, TypeError, "val_features must be a tensor"),
        ((X, V[:, :3]), {}, ValueError, r"val_features must be \[V, 4\] like features"),
        ((X[:0], V), {}, ValueError, "features must be non-empty"),
        ((X, V[:0]), {}, ValueError, "val_features must be non-empty"),
        ((X, V), {"k": 6}, ValueError, r"k must be at most the validation batch \(5\), got 6"),
        ((X, V), {"k": 0}, ValueError, "k must be a positive int"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"online_features: {message}"):
        online_features(*arguments, **options)


def batches(device, n=4):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, generator=g, dtype=torch.float64) * (i + 1) + i).to(device)
        for i in range(n)
    ]


def test_standardised_by_the_batch(device):
    standardize = OnlineStandardizer()
    for values in batches(device):
        standardized = standardize("nearest", values)
        # one mean and one standard deviation over all entries, with 1e-8 added to the variance
        assert abs(standardized.mean().item()) < 1e-14
        assert standardized.std(correction=0).item() == pytest.approx(1, abs=1e-8)
        assert (
            relative(
                standardized * (values.var(correction=0) + 1e-8).sqrt() + values.mean(), values
            )
            < 1e-14
        )
    assert standardize.state_dict() == {"running": {}}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])  # last batch only; half; the published order
def test_running_statistics_are_weighted_means_of_the_batches(momentum, device):
    """After n batches the first one weighs m^(n-1), and batch i weighs (1 - m) m^(n-i)."""
    standardize = OnlineStandardizer(momentum)
    seen = batches(device)
    for n, values in enumerate(seen, start=1):
        standardized = standardize("nearest", values)
        weights = [momentum ** (n - 1)]
        weights += [(1 - momentum) * momentum ** (n - i) for i in range(2, n + 1)]
        mean = sum(w * b.mean() for w, b in zip(weights, seen, strict=False))
        variance = sum(w * b.var(correction=0) for w, b in zip(weights, seen, strict=False))
        expected = (values - mean) / (variance + 1e-8).sqrt()
        assert relative(standardized, expected) < 1e-13  # observed 1e-16


def test_names_have_statistics_of_their_own(device):
    first, second, *_ = batches(device)
    standardize = OnlineStandardizer(0.9)
    standardize("nearest", first)
    assert_bitwise(standardize("centroid", second), OnlineStandardizer(0.9)("centroid", second))


def test_without_update_nothing_moves(device):
    first, second, *_ = batches(device)
    standardize, other = OnlineStandardizer(0.5), OnlineStandardizer(0.5)
    standardize("nearest", first)
    before = standardize.state_dict()
    standardized = standardize("nearest", second, update=False)
    assert_bitwise(standardize.state_dict(), before)
    expected = (second - first.mean()) / (first.var(correction=0) + 1e-8).sqrt()
    assert relative(standardized, expected) < 1e-14
    # a name without running statistics uses the batch's, and update=False stores none
    assert_bitwise(other("nearest", second, update=False), OnlineStandardizer()("nearest", second))
    assert other.state_dict() == {"running": {}}


def test_standardizer_resumes(device):
    first, second, third, fourth = batches(device)
    whole, resumed = OnlineStandardizer(0.9), OnlineStandardizer(0.9)
    for values in (first, second):
        whole("nearest", values)
    resumed.load_state_dict(whole.state_dict())
    for values in (third, fourth):
        assert_bitwise(resumed("nearest", values), whole("nearest", values))
    assert_bitwise(resumed.state_dict(), whole.state_dict())


# values outside [0, 1); values of other types
@pytest.mark.parametrize(
    ("momentum", "error"),
    [
        *((value, ValueError) for value in (-0.1, 1.0, 2.0, float("nan"))),
        *((value, TypeError) for value in ("0.9", True, torch.tensor(0.9))),
    ],
)
def test_refused_momentum(momentum, error):
    with pytest.raises(error, match=r"OnlineStandardizer: momentum must be None or in \[0, 1\)"):
        OnlineStandardizer(momentum)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "state must be a mapping, got NoneType"),
        ({}, TypeError, r"state\['running'\] must be a mapping, got NoneType"),
        ({"running": {"a": V[0, :2], "b": 3}}, TypeError, r"\['b'\] must be a tensor"),
        ({"running": {"a": V[0, :2], "b": V[0]}}, ValueError, r"\['b'\] must be a mean and a var"),
        ({"running": {"a": V[0, :2].int()}}, TypeError, r"\['a'\] must be a floating-point"),
    ],
)
def test_refused_states_change_nothing(state, error, message):
    standardize = OnlineStandardizer(0.9)
    standardize("nearest", V)
    before = standardize.state_dict()
    with pytest.raises(error, match=rf"OnlineStandardizer\.load_state_dict: .*{message}"):
        standardize.load_state_dict(state)
    assert_bitwise(standardize.state_dict(), before)


class TwoHeads(nn.Module):
    """The last linear layer in order of registration is not the last one called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.out = nn.Linear(4, 2)
        self.side = nn.Linear(5, 2)

    def forward(self, images, sequence):
        pooled = self.conv(images).mean((2, 3))
        return self.side(sequence).mean(1) + self.out(pooled)


def test_penultimate_features(device):
    """Of the last linear layer by default; averaged over positions, or over height and width."""
    model = TwoHeads().to(device)
    images, sequence = torch.randn(6, 3, 5, 7, device=device), torch.randn(6, 9, 5, device=device)
    expected = {
        None: sequence.mean(1),
        "out": model.conv(images).mean((2, 3)),
        "conv": images.mean((2, 3)),
    }
    for layer, values in expected.items():
        features = PenultimateFeatures(model, layer)
        with features.capture() as capture:
            model(images, sequence)
            pooled = capture.taken()
        torch.testing.assert_close(pooled, values, rtol=1e-6, atol=1e-7)
        assert not pooled.requires_grad
        # the hook is gone
        model(images, sequence)
        with pytest.raises(RuntimeError, match="must be called in the forward, got no call"):
            features.taken()


def test_refused_layers():
    with pytest.raises(ValueError, match=r"feature_layer must be a module path \(conv, out, side"):
        PenultimateFeatures(TwoHeads(), "fc")
    with pytest.raises(TypeError, match=r"feature_layer must be a module path \(.*, got int 3"):
        PenultimateFeatures(TwoHeads(), 3)
    with pytest.raises(TypeError, match=r"MTSStep: model must be a torch\.nn\.Module"):
        PenultimateFeatures(None)
    with pytest.raises(ValueError, match=r"given for a model without nn\.Linear"):
        PenultimateFeatures(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))


class Words(nn.Module):
    """A layer that is called by keyword, and one that takes integers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(input=self.embed(tokens))


def test_layers_called_by_keyword_and_layers_without_numbers():
    model, tokens = Words(), torch.arange(6).view(2, 3)
    features = PenultimateFeatures(model)
    with features.capture():
        model(tokens)
        assert torch.equal(features.taken(), model.embed(tokens).mean(1))
    features = PenultimateFeatures(model, "embed")
    message = "the input of layer 'embed' must be .* numbers, got a int64 tensor of shape"
    with features.capture(), pytest.raises(TypeError, match=message):
        model(tokens)


def test_a_hook_that_was_left_behind_adds_nothing():
    """As after a Ctrl-C between two lines of the block's end."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    watched = PenultimateFeatures(model)
    abandoned = watched.capture()
    abandoned.__enter__()
    model(torch.ones(5, 3))  # never left
    with watched.capture():
        model(torch.zeros(2, 3))
        assert len(watched.taken()) == 2
