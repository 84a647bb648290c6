"""MTSStep takes the reference's steps, and each of its options does what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, relative, snapshot
from models import CLASSES
from step_run import DRIFT, DRIFT_EXACT, StepRun, reference_step

import mts_fast
from mts_fast import reference
from mts_fast.hypergradient import ENGINES
from mts_fast.training import warmup_cosine

# the options tested here do not depend on the engine; this engine is exact to rounding.
EXACT_ENGINE = "forward_mode"


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])  # a scalar kappa; a diagonal one
@pytest.mark.parametrize("model", ["mlp", "batchnorm"])  # independent samples; coupled ones
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_steps_equal_the_reference(engine, model, optimizer, two_batches, device):
    options = {"model": model, "optimizer": optimizer, "dtype": torch.float64}
    expected = StepRun(device, online_features=False, **options)
    try:
        run = StepRun(device, online_features=False, engine=engine, **options)
    except RuntimeError as refused:
        pytest.skip(str(refused))
    tolerance = DRIFT.get(engine, DRIFT_EXACT)
    for seed in range(20):
        arguments = run.arguments(seed, two_batches=two_batches)
        result = run.step(**arguments)
        trace = reference_step(expected, arguments)
        assert relative(result.dots, trace.dots) < tolerance
        assert relative(result.losses, trace.losses) < tolerance
    for ours, theirs in ((run.model, expected.model), (run.selector, expected.selector)):
        for name, truth in theirs.state_dict().items():
            assert relative(ours.state_dict()[name], truth) < tolerance, name


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_validation_mode_with_batchnorm(mode, device):
    """Row 5 in either mode: BatchNorm on its running statistics, or on the validation batch's."""
    run = StepRun(
        device,
        model="batchnorm",
        dtype=torch.float64,
        engine=EXACT_ENGINE,
        online_features=False,
        validation_mode=mode,
    )
    arguments = run.arguments(0)
    (plain, optimizer), (ahead, ahead_optimizer) = (run.copy_of_plain_parts() for _ in range(2))
    with torch.no_grad():
        z = run.selector(arguments["features"], arguments["labels"], arguments["is_synthetic"])
        p = mts_fast.normalize_weights(z)
    losses = F.cross_entropy(plain(arguments["inputs"]), arguments["labels"], reduction="none")
    virtual_loss = F.cross_entropy(
        ahead(arguments["inputs"]), arguments["labels"], reduction="none"
    )
    (p * virtual_loss).sum().backward()
    g = [q.grad for q in ahead.parameters()]
    ahead_optimizer.step()
    output = ahead.train(mode == "train")(arguments["val_inputs"])
    val_loss = F.cross_entropy(output, arguments["val_labels"])
    v = torch.autograd.grad(val_loss, list(ahead.parameters()))
    direction = mts_fast.virtual_update(optimizer, g).scale(v)
    dots = reference.hypergradient_dots(losses, list(plain.parameters()), direction)
    result = run.step(**arguments)
    # observed 2e-16 and 4e-16
    assert relative(result.val_loss, val_loss) < 1e-13
    assert relative(result.dots, dots) < 1e-12


def test_hypergradient_lr_equals_the_reference(device):
    run = StepRun(
        device,
        dtype=torch.float64,
        online_features=False,
        engine=EXACT_ENGINE,
        hypergradient_lr=3.0,
    )
    expected = StepRun(device, dtype=torch.float64, online_features=False)
    for seed in range(3):
        arguments = run.arguments(seed)
        result = run.step(**arguments)
        trace = reference_step(expected, arguments, hypergradient_lr=3.0)
        assert relative(result.dots, trace.dots) < 1e-12  # observed 1e-15


@pytest.mark.parametrize("engine", ENGINES)
def test_self_check_is_small(engine, device):
    run = StepRun(device, dtype=torch.float64, engine=engine)
    for seed in range(3):
        # observed 2e-10 for finite differences, 5e-16
        assert run.step(**run.arguments(seed)).self_check < DRIFT.get(engine, DRIFT_EXACT)
    # with a selector batch only in calls 1, 2, 4, ...: the check then needs one more backward
    assert run.step(**run.arguments(4, two_batches=True)).self_check is not None
    run.step(**run.arguments(5))
    run.step(**run.arguments(6))
    assert run.step(**run.arguments(7, two_batches=True)).self_check is None


def test_selector_every_third_step(device):
    run = StepRun(device, engine=EXACT_ENGINE, online_features=False, selector_every=3)
    for call in range(7):
        before = snapshot(module=run.selector, optimizer=run.selector_optimizer)
        arguments = run.arguments(call)
        result = run.step(**arguments)
        after = snapshot(module=run.selector, optimizer=run.selector_optimizer)
        learned = call % 3 == 0
        assert (result.val_loss, result.dots, result.self_check).count(None) == (
            0 if learned else 3
        )
        if learned:
            assert any(not torch.equal(v, before["state"][n]) for n, v in after["state"].items())
        else:
            assert_bitwise(after, before)
        with torch.no_grad():
            z = run.selector(arguments["features"], arguments["labels"], arguments["is_synthetic"])
        assert_bitwise(result.normalized_weights, mts_fast.normalize_weights(z))


@pytest.mark.parametrize("class_weight", [None, [1.0, 0.5, 2.0]])  # uniform; by class
def test_warmup_trains_the_selector_alone(class_weight, device):
    c = None if class_weight is None else torch.tensor(class_weight, device=device)
    options = {"engine": EXACT_ENGINE, "class_weight": c}
    warm, cold = StepRun(device, warmup_steps=2, **options), StepRun(device, **options)
    initial = snapshot(module=warm.selector)["state"]
    for call in range(4):
        arguments = warm.arguments(call)
        result = warm.step(**arguments)
        if call == 0:
            # the selector's own step is as without warm-up
            other = cold.step(**arguments)
            assert_bitwise(result.dots, other.dots)
            assert_bitwise(snapshot(module=warm.selector), snapshot(module=cold.selector))
            assert not torch.equal(warm.selector.mlp[0].weight, initial["mlp.0.weight"])
            assert not torch.equal(result.normalized_weights, other.normalized_weights)
        weights = torch.ones(12, device=device) if c is None else c[arguments["labels"]]
        if call >= 2:
            weights = result.logits.sigmoid() * weights
        torch.testing.assert_close(
            result.normalized_weights, weights / weights.sum(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            result.loss, (result.normalized_weights * result.losses).sum(), rtol=1e-6, atol=0
        )


def test_class_weight_multiplies_the_weights(device):
    c = torch.tensor([1.0, 0.0, 2.5], device=device)
    run = StepRun(device, engine=EXACT_ENGINE, class_weight=c)
    arguments = run.arguments(0)
    result = run.step(**arguments)
    w = result.logits.sigmoid() * c[arguments["labels"]]
    torch.testing.assert_close(result.weights, w, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.normalized_weights, w / w.sum(), rtol=1e-6, atol=0)
    assert (result.normalized_weights[arguments["labels"] == 1] == 0).all()
    again = run.step.weights(**{k: v for k, v in arguments.items() if k != "val_labels"})
    assert (again[arguments["labels"] == 1] == 0).all() and (
        again[arguments["labels"] != 1] > 0
    ).all()


def test_vanished_weights_leave_only_momentum_and_decay(device):
    """All class weights are zero: so are p and the gradients of classifier and selector."""
    run = StepRun(device, engine=EXACT_ENGINE)
    run.step(**run.arguments(0))
    run.step.class_weight = torch.zeros(CLASSES, device=device)
    plain, optimizer = run.copy_of_plain_parts()
    for group in run.selector_optimizer.param_groups:
        group["weight_decay"] = 0.0
    result = run.step(**run.arguments(1))
    assert result.normalized_weights.tolist() == [0.0] * 12 == result.weights.tolist()
    assert result.loss == 0 and result.self_check == 0
    for p in plain.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_bitwise(run.model.state_dict(), plain.state_dict())
    assert all(p.grad.abs().max() == 0 for p in run.selector.parameters())
    assert all(torch.isfinite(p).all() for p in run.selector.parameters())


def test_max_grad_norm_clips_the_real_step_only(device):
    free = StepRun(device, engine=EXACT_ENGINE)
    clipped = StepRun(device, engine=EXACT_ENGINE, max_grad_norm=0.01)
    plain, optimizer = clipped.copy_of_plain_parts()
    arguments = clipped.arguments(0)
    expected, result = free.step(**arguments), clipped.step(**arguments)
    for name in ("dots", "val_loss", "normalized_weights"):
        assert_bitwise(getattr(result, name), getattr(expected, name))
    losses = F.cross_entropy(plain(arguments["inputs"]), arguments["labels"], reduction="none")
    (result.normalized_weights * losses).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    assert norm > 0.02
    optimizer.step()
    assert_bitwise(clipped.model.state_dict(), plain.state_dict())


def test_selector_batch_has_the_masks_of_the_training_forward(device):
    """The training batch passed as selector_batch gives the same step, dropout masks included."""
    one, two = (StepRun(device, model="dense", engine=EXACT_ENGINE) for _ in range(2))
    arguments = one.arguments(0)
    names = ("inputs", "labels", "features", "is_synthetic")
    same = mts_fast.SelectorBatch(*(arguments[name] for name in names))
    torch.manual_seed(1)
    expected = one.step(**arguments)
    torch.manual_seed(1)
    result = two.step(**arguments, selector_batch=same)
    assert_bitwise(result.dots, expected.dots)
    assert_bitwise(two.selector.state_dict(), one.selector.state_dict())


@pytest.mark.parametrize("warmup", [0, 4])  # the cosine alone; after a linear rise
def test_selector_scheduler_steps_in_every_call(warmup, device):
    run = StepRun(
        device,
        engine=EXACT_ENGINE,
        schedule=lambda o: warmup_cosine(o, warmup, 10),
        selector_every=2,
    )
    for t in range(10):
        share = (t - warmup) / (10 - warmup)
        factor = (t + 1) / (warmup + 1) if t < warmup else (1 + math.cos(math.pi * share)) / 2
        lr = run.selector_optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(0.05 * factor, rel=1e-12)
        run.step(**run.arguments(t))
    assert run.selector_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_statistics_are_those_of_the_weights(device):
    run = StepRun(device, engine=EXACT_ENGINE)
    result = run.step(**run.arguments(0))
    read = result.statistics.read()
    p, w = result.normalized_weights.double(), result.weights.double()
    assert read["mean_weight"] == pytest.approx(w.mean().item(), rel=1e-6)
    assert read["effective_batch_size"] == pytest.approx(1 / p.square().sum().item(), rel=1e-6)
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in vars(result).values())


def test_backend_set_around_the_call_is_kept(device):
    """`auto` must not override a `use_backend` around the call."""
    seen = []

    def loss(output, labels):
        seen.append(mts_fast.ops.current_backend())
        return F.cross_entropy(output, labels, reduction="none")

    run = StepRun(device, engine=EXACT_ENGINE, loss=loss)
    with mts_fast.use_backend("reference"):
        run.step(**run.arguments(0))
    assert set(seen) == {"reference"}
    seen.clear()
    explicit = StepRun(device, engine=EXACT_ENGINE, loss=loss, backend="reference")
    explicit.step(**explicit.arguments(0))
    assert set(seen) == {"reference"} and mts_fast.ops.current_backend() == "auto"


def test_weights_stay_float32_under_autocast(device):
    """bf16 logits would round p to three digits, and their sum away from 1."""
    run = StepRun(device, engine=EXACT_ENGINE)
    with torch.autocast(device.type, torch.bfloat16):
        result = run.step(**run.arguments(0))
    assert result.normalized_weights.dtype == torch.float32
    assert abs(result.normalized_weights.sum().item() - 1) < 1e-6
    gradients = [p.grad for p in run.model.parameters()]
    other = StepRun(device, engine=EXACT_ENGINE)
    other.step(**other.arguments(0))
    for g, full in zip(gradients, (p.grad for p in other.model.parameters()), strict=True):
        assert relative(g, full) < 0.05  # bf16 activations; observed 0.004


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "magic"}, ValueError, "engine must be one of 'auto', 'ghost'"),
        ({"backend": "magic"}, ValueError, "backend must be one of 'auto', 'reference'"),
        ({"validation_mode": "both"}, ValueError, "validation_mode must be one of 'eval', 'train'"),
        ({"check": "maybe"}, ValueError, "check must be one of 'auto', 'always', 'never'"),
        ({"selector_every": 0}, ValueError, "selector_every must be an int of 1 or more, got 0"),
        (
            {"selector_every": 1.5},
            TypeError,
            "selector_every must be an int of 1 or more, got float",
        ),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be an int of 0 or more, got -1"),
        (
            {"hypergradient_lr": 0.0},
            ValueError,
            "hypergradient_lr must be a finite number above 0, got 0.0",
        ),
        ({"feature_layer": "fc"}, ValueError, r"feature_layer must be a module path \(0, 1, 2"),
        (
            {"online_momentum": 1.0},
            ValueError,
            "online_momentum must be a finite number at least 0 and below 1, got 1.0",
        ),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=f"MTSStep: {message}"):
        StepRun(torch.device("cpu"), **options)


@pytest.mark.parametrize(
    ("warmup", "total", "message"),
    [
        (10, 10, "warmup_steps must be in"),
        (-1, 10, "warmup_steps must"),
        (0, 0, "total_steps must"),
    ],
)
def test_refused_schedules(warmup, total, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=f"warmup_cosine: {message}"):
        warmup_cosine(optimizer, warmup, total)
