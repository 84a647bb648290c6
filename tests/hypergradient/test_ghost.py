"""The ghost engine's parts: dots, weighted gradients and refusals; it is not selectable yet."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mts_fast import reference
from mts_fast.hypergradient.ghost import Ghost, Unsupported
from mts_fast.hypergradient.objective import LabelledBatch, Objective

BATCH = 6
TOLERANCE = 1e-9  # float64; observed 1e-15


class SmallViT(nn.Module):
    """Class token, position embeddings, layer scale, attention: every way to use a parameter."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.scale = nn.Parameter(torch.rand(16))
        self.longer = nn.Parameter(torch.randn(20, 16))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        x = x * self.scale + self.longer[:17]
        return self.head(self.blocks(x)[:, 0])


class Tied(nn.Module):
    """A matrix used as embedding, as output layer, and twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.mix(self.mix(self.embed(x)).tanh())
        return nn.functional.linear(hidden.mean(1), self.embed.weight)


def noise():
    """Inputs for models of 12 features, all of class 0."""
    return LabelledBatch(torch.randn(BATCH, 12, dtype=torch.float64), torch.zeros(BATCH).long())


def mlp():
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(inplace=True), nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 5)
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.InstanceNorm2d(8, affine=True),
        nn.Conv2d(8, 4, 3, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(196, 5),
    )


# in-place activation and norms; every kind of convolution; bare parameters; tied weights
CASES = {
    "mlp": (mlp, lambda: torch.randn(BATCH, 12, dtype=torch.float64)),
    "convolutional": (convolutional, lambda: torch.randn(BATCH, 3, 9, 9, dtype=torch.float64)),
    "vit": (SmallViT, lambda: torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)),
    "tied": (Tied, lambda: torch.randint(7, (BATCH, 4))),
}


def make(case):
    build, draw = CASES[case]
    model = build().double()
    parameters = list(model.parameters())
    labels = torch.randint(5, (BATCH,))
    return Objective(model), parameters, draw(), labels


@pytest.mark.parametrize("case", list(CASES))
def test_dots_equal_double_backward(case):
    objective, parameters, x, y = make(case)
    direction = [torch.randn_like(p) for p in parameters]
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        truth = reference.hypergradient_dots(
            objective.losses(LabelledBatch(x, y)), parameters, direction
        )
    line = Ghost(objective, parameters).linearize(LabelledBatch(x, y))
    torch.testing.assert_close(line.dots(direction), truth, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", list(CASES))
def test_gradients_equal_autograd_for_both_weights(case):
    """The first by a backward, the second by book-keeping alone."""
    objective, parameters, x, y = make(case)
    line = Ghost(objective, parameters).linearize(LabelledBatch(x, y))
    for p in torch.rand(2, BATCH, dtype=torch.float64):
        truth = torch.autograd.grad(objective.losses(LabelledBatch(x, y)), parameters, p)
        for found, expected in zip(line.gradient(p), truth, strict=True):
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


class Monkeypatched(nn.Module):
    """Reads its weight where no function call shows it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x):
        return torch.einsum("bi,oi->bo", x, self.layer.weight.sin())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), "BatchNorm"),
        (Monkeypatched(), "layer.weight is used by sin"),
    ],
)
def test_refusals_name_the_parameter(model, reason):
    model = model.double()
    engine = Ghost(Objective(model), list(model.parameters()))
    with pytest.raises(Unsupported, match=reason):
        engine.linearize(noise())


def test_loss_that_mixes_samples_is_refused():
    model = mlp().double()

    def mixing(output, labels):
        losses = nn.functional.cross_entropy(output, labels, reduction="none")
        return losses / losses.sum()

    engine = Ghost(Objective(model, mixing), list(model.parameters()))
    with pytest.raises(Unsupported, match="samples are mixed"):
        engine.linearize(noise())
