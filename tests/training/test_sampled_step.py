"""MTSStep(compute=...): the whole step, its state, its refusals."""

import copy
import logging

import pytest
import torch
from models import CLASSES
from step_run import StepRun
from torch import nn

import mts_fast
from mts_fast.distributed import Alone
from mts_fast.training.sampled.compute import SHARES, ComputeChoice, Costs


def state(run):
    """Everything that a step writes, flat."""
    tensors = [*run.model.state_dict().values(), *run.selector.state_dict().values()]
    for optimizer in (run.optimizer, run.selector_optimizer):
        for entries in optimizer.state_dict()["state"].values():
            tensors += [torch.as_tensor(v) for v in entries.values() if v is not None]
    return torch.cat([t.double().flatten() for t in tensors])


def without_dropout(run):
    for module in run.model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return run


def steps(run, seeds=range(4), **options):
    for seed in seeds:
        result = run.step(**run.arguments(seed, **options))
    return result


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("schedule", ["exact", "reuse"])
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
@pytest.mark.parametrize("model", ["mlp", "batchnorm", "dropout"])
def test_all_candidates_computed_is_the_exact_step(model, optimizer, schedule, two_batches):
    states = []
    for compute in (None, 12):
        run = without_dropout(
            StepRun(
                "cpu",
                model=model,
                optimizer=optimizer,
                dtype=torch.float64,
                step_schedule=schedule,
                compute=compute,
                class_weight=torch.tensor([0.5, 2.0, 1.0]),
            )
        )
        steps(run, two_batches=two_batches)
        states.append(state(run))
    torch.testing.assert_close(*states, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch": 5},
        {"selector_every": 2, "warmup_steps": 1},
        {"online_features": False},
        {"track_gsnr": True, "online_momentum": 0.9},
        {"engine": "double_backward"},
        {"engine": "finite_difference"},
        {"validation_mode": "train", "max_grad_norm": 0.1},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")},
    ],
    ids=lambda options: "-".join(options),
)
def test_all_candidates_computed_is_the_exact_step_with_options(options):
    states = [
        state(run)
        for compute in (None, 12)
        for run in [StepRun("cpu", dtype=torch.float64, compute=compute, **options)]
        if steps(run)
    ]
    tolerance = 1e-7 if options.get("engine") == "finite_difference" else 1e-11
    torch.testing.assert_close(*states, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", ["mlp", "batchnorm", "dropout", "dense"])
def test_a_step_computes_k_samples(model):
    """The training forward, in the model's modes and with a graph, sees k samples; buffers move
    once, by all of the batch."""
    run = StepRun("cpu", model=model, compute=5)
    seen = []
    first = next(m for m in run.model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    first.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    exact = StepRun("cpu", model=model)
    arguments = run.arguments(0)
    result = run.step(**arguments)
    exact.step(**arguments)
    assert 12 not in seen
    assert 5 in seen
    assert result.losses.shape == result.normalized_weights.shape == result.dots.shape == (12,)
    assert result.sampling.read()["computed"] == 5
    assert result.statistics.read()["computed"] == 5
    if model != "dense":  # its masks come before its BatchNorm
        for a, b in zip(run.model.buffers(), exact.model.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert "forward" not in {n for m in run.model.modules() for n in vars(m)}


def test_a_run_is_repeatable_and_resumes_bit_for_bit():
    whole = StepRun("cpu", compute="auto", online_momentum=0.9)
    torch.manual_seed(1)
    steps(whole, range(7))
    saved, generator = copy.deepcopy(whole.step.state_dict()), torch.get_rng_state()
    steps(whole, range(7, 18))
    resumed = StepRun("cpu", compute="auto", online_momentum=0.9)
    resumed.step.load_state_dict(saved)
    torch.set_rng_state(generator)
    result = steps(resumed, range(7, 18))
    assert torch.equal(state(whole), state(resumed))
    assert result.sampling is None or result.sampling.read()["computed"] >= 1


@pytest.mark.parametrize("model", ["mlp", "batchnorm"])
def test_a_call_that_raises_leaves_nothing(model):
    run = StepRun("cpu", model=model, compute=5)
    steps(run)
    arguments = run.arguments(9)
    before, generator = state(run), torch.get_rng_state()
    compute = copy.deepcopy(run.step.state_dict()["compute"])
    arguments["val_inputs"] = torch.full_like(arguments["val_inputs"], torch.nan)
    with pytest.raises(ValueError, match="must be finite"):
        run.step(**arguments)
    assert torch.equal(state(run), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert repr(run.step.state_dict()["compute"]) == repr(compute)
    assert "forward" not in {n for m in run.model.modules() for n in vars(m)}


class Coupled(nn.Module):
    """Takes the mean over the batch from its inputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.body(x)
        return self.head((h - h.mean(0)).tanh())


def step_of(model, **options):
    selector = mts_fast.Selector(2, CLASSES, hidden=(8,))
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector.parameters()),
        online_features=False,
        **options,
    )


def batch(shape=(4,), size=12):
    x, y = torch.randn(size, *shape), torch.arange(size) % CLASSES
    features = torch.randn(size, 2)
    return {
        "inputs": x,
        "labels": y,
        "features": features,
        "val_inputs": x[:6],
        "val_labels": y[:6],
    }


def test_a_model_whose_samples_act_on_each_other_is_refused():
    with pytest.raises(RuntimeError, match=r"model must be one whose samples do not act on each"):
        step_of(Coupled(), compute=5)(**batch())
    step_of(Coupled())(**batch())  # all of it is served


def test_compiled_batchnorm_in_train_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match=r"model must be run by its modules.*torch\.compile"):
        step_of(compiled, compute=5)(**batch())


class NoLinear(nn.Module):
    """Its last layer is a convolution."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))

    def forward(self, x):
        return {"logits": self.body(x).mean((2, 3))}


def test_without_a_linear_layer_the_control_variate_falls_away_with_a_note(caplog):
    with caplog.at_level(logging.INFO, logger="mts_fast"):
        result = step_of(NoLinear(), compute=5)(**batch((2, 6, 6)))
    assert any("no nn.Linear" in record.getMessage() for record in caplog.records)
    sampling = result.sampling.read()
    assert sampling["slope"] == 0.0
    assert sampling["computed"] == 5


def test_errors_that_are_all_zero_leave_the_weights_as_the_measure():
    """A loss without slope anywhere: q = p, and the step goes on."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES))
    step = step_of(model, compute=5, loss=lambda output, labels: (0 * output).sum(1))
    result = step(**batch())
    assert result.sampling.read()["largest_weight"] <= 1 / (0.3 * 5)
    assert not result.dots.any()


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (0, "compute must be"),
        (-3, "compute must be"),
        (True, "compute must be None, an int, a share"),
        (1.5, "compute must be"),
        (float("nan"), "compute must be"),
        ("half", "compute must be .*'half'"),
        ([4], "compute must be"),
    ],
)
def test_bad_options_are_named(compute, message):
    with pytest.raises((TypeError, ValueError), match=message):
        step_of(nn.Linear(4, CLASSES), compute=compute)


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16", torch.int8])
def test_a_bad_candidate_dtype_is_named(dtype):
    with pytest.raises(TypeError, match=r"candidate_dtype must be None, torch\.bfloat16 or"):
        step_of(nn.Linear(4, CLASSES), compute=5, candidate_dtype=dtype)


def test_more_than_the_batch_is_refused_and_a_share_fits_every_batch():
    step = step_of(nn.Linear(4, CLASSES), compute=32)
    with pytest.raises(ValueError, match=r"compute must be at most .*\(12\), got 32.*share"):
        step(**batch())
    assert step.steps == 0
    shared = step_of(nn.Linear(4, CLASSES), compute=0.25)
    for size, expected in ((12, 3), (5, 1), (1, 1)):
        arguments = batch(size=size)
        result = shared(**arguments)
        assert result.sampling.read()["computed"] == expected


def test_losses_of_stage_1_that_are_not_finite_are_named():
    arguments = batch()
    arguments["inputs"][3] = torch.inf
    arguments["val_inputs"] = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"the loss of every candidate must be finite.*\(3\)"):
        step_of(nn.Linear(4, CLASSES), compute=5)(**arguments)


@pytest.mark.parametrize("model", ["dense", "mlp"])
def test_candidates_in_16_bit_leave_the_computed_in_32(model):
    """The forward of all runs under autocast, that of the computed does not."""
    run = StepRun("cpu", model=model, compute=5, candidate_dtype=torch.bfloat16)
    seen = set()
    first = next(m for m in run.model.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda module, args, output: seen.add((len(output), output.dtype)))
    result = steps(run)
    assert (12, torch.bfloat16) in seen
    assert (5, torch.float32) in seen and (5, torch.bfloat16) not in seen
    assert result.losses.dtype == torch.float32
    exact = StepRun("cpu", model=model)
    steps(exact)
    whole = StepRun("cpu", model=model, compute=12, candidate_dtype=torch.bfloat16)
    without_dropout(whole), without_dropout(exact)
    arguments = exact.arguments(9)
    whole.step.load_state_dict(exact.step.state_dict())
    near, truth = whole.step(**arguments), exact.step(**arguments)
    cosine = nn.functional.cosine_similarity
    # all are computed, so that only the weights, by features in 16 bit, are rounded
    torch.testing.assert_close(near.normalized_weights, truth.normalized_weights, rtol=0.05, atol=0)
    assert float(cosine(near.dots - near.dots.mean(), truth.dots - truth.dots.mean(), 0)) > 0.99


def excess(by_share):
    """Sums as "auto" keeps them: of the selector's gradient the excess, of the classifier's 0."""
    rows = [[[e, 1.0], [0.0, 1.0]] for e in by_share]
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("by_share", "expected"),
    [
        ([0.0] * 5, 1 / 16),  # drawing costs nothing: the least
        ([float("nan")] * 5, 1.0),
        ([40.0, 20.0, 9.0, 3.0, 0.0], 1.0),  # it costs all that it saves
        ([9.0, 0.6, 0.5, 0.4, 0.0], 1 / 8),
    ],
)
def test_auto_takes_the_smallest_price_times_variance(by_share, expected):
    choice = ComputeChoice("auto")
    costs = Costs(passes=1, validation=1 / 8)
    for _ in range(7):
        assert choice.number(128) == 32
        choice._sums = excess(by_share)
        choice.count(costs, Alone())
    number = choice.number(128)
    assert number == (None if expected == 1.0 else round(128 * expected))
    prices = {s: costs.of(s) * (1 + e) for s, e in zip(SHARES, by_share, strict=True) if e == e}
    assert min(prices, key=prices.get, default=1.0) == expected


def test_auto_that_computes_all_looks_again_before_it_decides_again():
    choice = ComputeChoice("auto")
    costs = Costs(passes=1, validation=1 / 8)
    numbers = []
    for call in range(1, 17):
        numbers.append(choice.number(128))
        if numbers[-1] is not None:
            choice._sums = excess([40.0, 20.0, 9.0, 3.0, 0.0] if call < 8 else [0.0] * 5)
        choice.count(costs, Alone())
    assert numbers[7:11] == [None] * 4  # decided in call 8
    assert numbers[11:15] == [64] * 4  # calls 12 to 15 draw a half, to have something to see
    assert numbers[15] == 8


def test_autocast_and_a_scaler_take_sampled_steps():
    for dtype in (torch.bfloat16, torch.float16):
        scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
        run = StepRun("cpu", compute=5, scaler=scaler)
        with torch.autocast("cpu", dtype):
            result = steps(run, range(3))
        assert torch.isfinite(state(run)).all()
        assert result.sampling.read()["computed"] == 5
