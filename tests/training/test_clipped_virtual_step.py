"""clip_virtual_step=True: the hypergradient of the clipped step, as torch takes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, relative
from models import CLASSES
from step_run import DRIFT, DRIFT_EXACT, OPTIMIZERS, StepRun, reference_step
from torch import nn

import mts_fast
from mts_fast.hypergradient import ENGINES

CLIPS, CLIPS_NOT = 0.05, 1e3  # of gradients of norm 0.3 to 3
CLIPPED = {"max_grad_norm": CLIPS, "clip_virtual_step": True}


def step_of(model, optimizer, **options):
    torch.manual_seed(1)
    selector = mts_fast.Selector(0, CLASSES, hidden=(4,)).double()
    selector_optimizer = torch.optim.AdamW(selector.parameters(), lr=0.05)
    options = {"online_features": False} | options
    return mts_fast.MTSStep(model, optimizer, selector, selector_optimizer, **options)


class Idle(nn.Module):
    """With a layer that gets no gradient, and BatchNorm in the model's mode."""

    def __init__(self):
        super().__init__()
        self.idle, self.first, self.norm = nn.Linear(2, 2), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).tanh())


def drawn(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(21, 6, generator=g, dtype=torch.float64)
    y = torch.randint(CLASSES, (21,), generator=g)
    return {"inputs": x[:12], "labels": y[:12], "val_inputs": x[12:], "val_labels": y[12:]}


def dots_by_differences(model, optimizer, batch, p, max_norm):
    """-dL_val/dp_i by central differences of a real step: backward, clip_grad_norm_, step()."""

    def val_loss(weights):
        twin, torchs = copy.deepcopy((model, optimizer))
        torchs.zero_grad()
        losses = F.cross_entropy(twin(batch["inputs"]), batch["labels"], reduction="none")
        (weights * losses).sum().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        torchs.step()
        with torch.no_grad():
            return F.cross_entropy(twin.eval()(batch["val_inputs"]), batch["val_labels"])

    h = 1e-4 * torch.eye(len(p), dtype=p.dtype)
    # of fourth order: an error of h^4 and of 1e-16 / h
    near = [val_loss(p + row) - val_loss(p - row) for row in h]
    far = [val_loss(p + 2 * row) - val_loss(p - 2 * row) for row in h]
    return torch.stack([(b - 8 * a) / 12e-4 for a, b in zip(near, far, strict=True)])


def groups(model):
    return [
        {"params": [*model.first.parameters(), *model.idle.parameters()], "weight_decay": 0.1},
        {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 0.3},
    ]


RULES = {
    "nesterov": lambda g: torch.optim.SGD(g, lr=1.0, momentum=0.9, nesterov=True),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.1, eps=1e-2),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=0.1, eps=1e-2, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("mode", ["train", "eval"])  # coupled samples; independent ones
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("engine", ENGINES)
def test_dots_are_the_derivative_of_the_whole_clipped_step(engine, rule, mode):
    """Two parameter groups, parameters without a gradient, and an optimizer in mid-run."""
    if engine == "ghost" and mode == "train":
        pytest.skip("BatchNorm in train mode")
    torch.manual_seed(0)
    model = Idle().double().train(mode == "train")
    optimizer = RULES[rule](groups(model))
    step = step_of(model, optimizer, engine=engine, **CLIPPED)
    for call in range(3):
        batch = drawn(call)
        model_before, optimizer_before = copy.deepcopy((model, optimizer))
        p = weights_of(step, batch)
        dots = step(**batch).dots
        truth = dots_by_differences(model_before, optimizer_before, batch, p, CLIPS)
        # observed 3e-10; of the engine by differences 2e-8
        assert relative(dots, truth) < (1e-6 if engine == "finite_difference" else 1e-8)


def weights_of(step, batch):
    """p, before the selector moves."""
    w = step.weights(batch["inputs"], batch["labels"])
    return w / w.sum()


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("max_norm", [CLIPS, CLIPS_NOT])
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("model", ["mlp", "batchnorm"])
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_equal_the_reference(engine, model, optimizer, max_norm, two_batches, device):
    options = {"model": model, "optimizer": optimizer, "dtype": torch.float64}
    clip = {"max_grad_norm": max_norm, "clip_virtual_step": True}
    expected = StepRun(device, online_features=False, **options)
    if engine == "ghost" and model == "batchnorm":
        pytest.skip("BatchNorm in train mode")
    run = StepRun(device, online_features=False, engine=engine, **options, **clip)
    tolerance = DRIFT.get(engine, DRIFT_EXACT)
    for seed in range(6):
        arguments = run.arguments(seed, two_batches=two_batches)
        result = run.step(**arguments)
        trace = reference_step(expected, arguments, **clip)
        assert relative(result.dots, trace.dots) < tolerance
    for ours, theirs in ((run.model, expected.model), (run.selector, expected.selector)):
        for name, truth in theirs.state_dict().items():
            assert relative(ours.state_dict()[name], truth) < tolerance, name


def test_muon_through_the_clip():
    """An optimizer that mixes the entries of a matrix; the truth is autograd's, through both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    weights = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    optimizer = torch.optim.Muon(weights.values(), lr=0.1)
    step = step_of(model, optimizer, engine="ghost", **CLIPPED)
    batch = drawn(0)
    p = weights_of(step, batch).requires_grad_()
    losses = F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")
    g = torch.autograd.grad((p * losses).sum(), list(weights.values()), create_graph=True)
    norm = torch.cat([t.flatten() for t in g]).norm()
    clipped = [t * (CLIPS / (norm + 1e-6)).clamp(max=1.0) for t in g]
    update = mts_fast.virtual_update(optimizer, [t.detach() for t in clipped])
    moved = [t.requires_grad_() for t in update.parameters]
    theta = dict(zip(weights, moved, strict=True))
    output = torch.func.functional_call(model, theta, batch["val_inputs"])
    v = torch.autograd.grad(F.cross_entropy(output, batch["val_labels"]), moved)
    inner = sum((a * b).sum() for a, b in zip(update.scale(v), clipped, strict=True))
    (truth,) = torch.autograd.grad(inner, p)
    assert relative(step(**batch).dots, truth) < 1e-12


def test_the_clip_that_once_was_left_out():
    """Without the option the dots are those of another step: a cosine of 0.87 to 0.91 was seen."""
    cosines = {}
    for clips in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        step = step_of(model, optimizer, max_grad_norm=CLIPS, clip_virtual_step=clips)
        batch = drawn(0)
        p = weights_of(step, batch)
        truth = dots_by_differences(*copy.deepcopy((model, optimizer)), batch, p, CLIPS)
        cosines[clips] = torch.cosine_similarity(step(**batch).dots, truth, dim=0).item()
    assert cosines[True] > 1 - 1e-12
    assert cosines[False] < 0.97


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_reuse_the_virtual_step_is_the_real_one(optimizer, device):
    run = StepRun(
        device, optimizer=optimizer, dtype=torch.float64, step_schedule="reuse", **CLIPPED
    )
    for seed in range(3):
        arguments = run.arguments(seed)
        result = run.step(**arguments)
        with torch.no_grad():
            output = run.model.eval()(arguments["val_inputs"])
        run.model.train()
        truth = F.cross_entropy(output, arguments["val_labels"])
        torch.testing.assert_close(result.val_loss, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_within_the_norm_changes_nothing(engine, device):
    plain, clipped = (
        StepRun(device, engine=engine, max_grad_norm=CLIPS_NOT, clip_virtual_step=clips)
        for clips in (False, True)
    )
    for seed in range(3):
        expected = plain.step(**plain.arguments(seed))
        result = clipped.step(**clipped.arguments(seed))
        for name in ("dots", "val_loss", "normalized_weights"):
            assert_bitwise(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 5},
        {"memory": "low"},
        {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**10)},
        {"compute": 12},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_run_the_batch_give_the_same_steps(options):
    runs = [StepRun("cpu", dtype=torch.float64, **CLIPPED, **more) for more in ({}, options)]
    for seed in range(4):
        for run in runs:
            run.step(**run.arguments(seed))
    states = [(run.model.state_dict(), run.selector.state_dict()) for run in runs]
    torch.testing.assert_close(*states, rtol=0, atol=1e-11)


def test_float16_with_a_scaler_is_near_float64():
    dots = []
    for half in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        model = model.float() if half else model.double()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if half else None
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = step_of(model, optimizer, scaler=scaler, **CLIPPED)
        batch = drawn(0)
        if half:
            batch = {k: t.float() if t.is_floating_point() else t for k, t in batch.items()}
        with torch.autocast("cpu", torch.float16, enabled=half):
            dots.append(step(**batch).dots.double())
    assert torch.cosine_similarity(*dots, dim=0) > 0.999


def test_a_gradient_of_zero_is_not_divided_by_its_norm():
    """max_grad_norm below torch's 1e-6 clips a gradient of 0, too."""
    zeros = {"class_weight": torch.zeros(CLASSES), "engine": "forward_mode"}
    clip = {"max_grad_norm": 1e-7, "clip_virtual_step": True}
    plain, clipped = (StepRun("cpu", dtype=torch.float64, **zeros, **o) for o in ({}, clip))
    expected = plain.step(**plain.arguments(0)).dots
    dots = clipped.step(**clipped.arguments(0)).dots
    torch.testing.assert_close(dots, 0.1 * expected)  # 1e-7 / (0 + 1e-6)
    assert expected.abs().max() > 0.01


def test_the_option_needs_a_norm():
    with pytest.raises(ValueError, match="MTSStep: clip_virtual_step must be False without"):
        StepRun("cpu", clip_virtual_step=True)
