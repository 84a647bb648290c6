"""For every kind of model and loss, a step equals autograd through the virtual update."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from models import CLASSES, TiedTagger, TransformerTagger, TwoTower, mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mts_fast
from mts_fast import reference
from mts_fast.hypergradient import ENGINES, Objective
from mts_fast.ops.virtual_update import optimizer_states

B, V, T = 8, 5, 4
# float64; observed at most 3e-10 for finite differences and 7e-15.
TOLERANCE = {"finite_difference": 1e-8}
EXACT = 1e-12


class OutputObject(nn.Module):
    """Returns its logits as an attribute, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x))


class LinearSelector(nn.Module):
    """A custom selector with logits [B, 1]."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Linear(features, 1)
        self.by_class = nn.Embedding(CLASSES, 1)

    def forward(self, features, classes, is_synthetic):
        return self.features(features) + self.by_class(classes) * is_synthetic[:, None]


@dataclass
class Scenario:
    """A model, batches for it, and its per-sample loss as the oracle writes it."""

    model: nn.Module
    inputs: Any
    labels: torch.Tensor
    val_inputs: Any
    val_labels: torch.Tensor
    loss: Any = None  # (output, labels) -> [B]
    classes: torch.Tensor | None = None
    options: dict = field(default_factory=dict)
    selector: Any = mts_fast.Selector


def per_class(output, labels):
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    return F.cross_entropy(logits, labels, reduction="none")


def per_position(logits, labels):
    """Mean over the positions of each sequence, one sequence at a time."""
    return torch.stack([F.cross_entropy(row, y) for row, y in zip(logits, labels, strict=True)])


def squared_error(output, labels):
    return (output - labels).square().mean(1)


def make(name, device):
    g = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=g).to(device)

    torch.manual_seed(12)
    labels = integers(CLASSES, B), integers(CLASSES, V)
    vectors = normal(B, 4), normal(V, 4)
    if name == "class_weight":
        weight = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64, device=device)
        scenario = Scenario(
            mlp(), vectors[0], labels[0], vectors[1], labels[1], options={"class_weight": weight}
        )
    elif name == "regression":
        scenario = Scenario(
            mlp(classes=2),
            vectors[0],
            normal(B, 2),
            vectors[1],
            normal(V, 2),
            loss=squared_error,
            classes=torch.zeros(B, dtype=torch.int64, device=device),
        )
    elif name == "language":
        tokens, val_tokens = integers(7, B, T + 1), integers(7, V, T + 1)
        scenario = Scenario(
            TiedTagger(7),
            tokens[:, :-1],
            tokens[:, 1:],
            val_tokens[:, :-1],
            val_tokens[:, 1:],
            classes=integers(CLASSES, B),
        )
    elif name == "transformer":
        scenario = Scenario(
            TransformerTagger(),
            normal(B, T, 8),
            integers(CLASSES, B, T),
            normal(V, T, 8),
            integers(CLASSES, V, T),
            classes=integers(CLASSES, B),
        )
    elif name == "dict":
        x, val = ({"left": normal(n, 4), "right": normal(n, 3)} for n in (B, V))
        scenario = Scenario(TwoTower(), x, labels[0], val, labels[1])
    elif name == "tuple":
        x, val = ((normal(n, 4), normal(n, 3)) for n in (B, V))
        scenario = Scenario(TwoTower(), x, labels[0], val, labels[1])
    elif name == "output_object":
        scenario = Scenario(OutputObject(), vectors[0], labels[0], vectors[1], labels[1])
    elif name == "own_selector":
        scenario = Scenario(
            mlp(),
            vectors[0],
            labels[0],
            vectors[1],
            labels[1],
            selector=lambda features, _: LinearSelector(features),
        )
    else:
        scenario = Scenario(mlp(), vectors[0], labels[0], vectors[1], labels[1])
        scenario.model[0].bias.requires_grad_(False)
    scenario.model.to(device, torch.float64).train()
    return scenario


SCENARIOS = (
    "class_weight",
    "regression",  # a custom loss, labels that are not classes
    "language",  # next-token prediction, labels [B, T], tied weights
    "transformer",
    "dict",
    "tuple",
    "output_object",
    "own_selector",
    "frozen_bias",
)


def oracle(scenario, optimizer, selector, features, is_synthetic):
    """Losses, mean validation loss and dL_val/dphi: nothing but autograd and the definitions."""
    loss = scenario.loss or (per_class if scenario.labels.ndim == 1 else per_position)
    parameters = mts_fast.ops.trainable_parameters(optimizer)
    states = optimizer_states(optimizer)
    names = [n for n, p in scenario.model.named_parameters() if p.requires_grad]
    classes = scenario.labels if scenario.classes is None else scenario.classes
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        losses = loss(Objective(scenario.model).forward(scenario.inputs), scenario.labels)
        w = selector(features, classes, is_synthetic).reshape(-1).sigmoid()
        if "class_weight" in scenario.options:
            w = w * scenario.options["class_weight"][classes]
        p = w / w.sum()
        g = torch.autograd.grad((p * losses).sum(), parameters, create_graph=True)
        theta = {
            n: reference.virtual_update(q, dq, states[q])
            for n, q, dq in zip(names, parameters, g, strict=True)
        }
        x = scenario.val_inputs
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        output = torch.func.functional_call(scenario.model, theta, args, kwargs)
        val_loss = loss(output, scenario.val_labels).mean()
        truth = reference.hypergradient_double_backward(val_loss, list(selector.parameters()))
    return losses.detach(), val_loss.detach(), truth


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_step_equals_double_backward(name, engine, device):
    scenario = make(name, device)
    features = torch.linspace(-1, 1, 2 * B, dtype=torch.float64, device=device).view(B, 2)
    is_synthetic = torch.arange(B, device=device) % 2 == 0
    selector = scenario.selector(2, CLASSES).to(device, torch.float64)
    optimizer = torch.optim.SGD(scenario.model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    try:
        step = mts_fast.MTSStep(
            scenario.model,
            optimizer,
            selector,
            torch.optim.SGD(selector.parameters(), lr=0.5),
            engine=engine,
            online_features=False,
            loss=scenario.loss,
            **scenario.options,
        )
    except RuntimeError as refused:
        pytest.skip(str(refused))
    for _ in range(2):  # the second time with momentum
        losses, val_loss, truth = oracle(scenario, optimizer, selector, features, is_synthetic)
        result = step(
            scenario.inputs,
            scenario.labels,
            val_inputs=scenario.val_inputs,
            val_labels=scenario.val_labels,
            features=features,
            is_synthetic=is_synthetic,
            classes=scenario.classes,
        )
        assert relative(result.losses, losses) < EXACT
        assert relative(result.val_loss, val_loss) < EXACT
        gradients = [q.grad for q in selector.parameters()]
        largest = max(t.abs().max() for t in truth)
        for ours, exact in zip(gradients, truth, strict=True):
            gap = (ours - exact).abs().max() / largest
            assert gap < TOLERANCE.get(engine, EXACT)
        assert result.self_check < TOLERANCE.get(engine, EXACT)


def test_sequence_labels_need_classes(device):
    scenario = make("language", device)
    selector = mts_fast.Selector(4, CLASSES).to(device)
    step = mts_fast.MTSStep(
        scenario.model,
        torch.optim.SGD(scenario.model.parameters(), lr=0.1),
        selector,
        torch.optim.SGD(selector.parameters(), lr=0.1),
    )
    with pytest.raises(ValueError, match=r"labels must be class indices \[B\].*pass classes="):
        step(
            scenario.inputs,
            scenario.labels,
            val_inputs=scenario.val_inputs,
            val_labels=scenario.val_labels,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of the selector
def test_classifier_and_selector_of_different_dtypes(dtype, device):
    """A float64 classifier with a float32 selector, and vice versa, GSNR included."""
    scenario = make("dict", device)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    scenario.model.to(other)
    inputs, val = (
        {k: v.to(other) for k, v in x.items()} for x in (scenario.inputs, scenario.val_inputs)
    )
    selector = mts_fast.Selector(4, CLASSES).to(device, dtype)
    step = mts_fast.MTSStep(
        scenario.model,
        torch.optim.SGD(scenario.model.parameters(), lr=0.1),
        selector,
        torch.optim.SGD(selector.parameters(), lr=0.1),
        track_gsnr=True,
    )
    result = step(inputs, scenario.labels, val_inputs=val, val_labels=scenario.val_labels)
    assert result.normalized_weights.dtype == dtype
    # the sum has float32 precision, the lower of the two dtypes; observed 6e-8
    assert abs(result.normalized_weights.sum().item() - 1) < 1e-6
    # finite differences in float32; observed 3e-4
    assert result.self_check < 1e-2 and torch.isfinite(result.gsnr)
