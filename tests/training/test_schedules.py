"""schedule, memory and micro_batch: what they change in a step, and what they must not."""

import copy

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot
from step_run import StepRun

import mts_fast

# float64 over 5 steps; observed 2e-15 for ghost
EXACT = 1e-11


def take_steps(run, steps=5, **options):
    results = []
    for seed in range(steps):
        results.append(run.step(**run.arguments(seed, **options)))
    return results


def assert_same_run(one, other, first, second):
    """Two runs took the same steps, up to rounding."""
    for a, b in zip(first, second, strict=True):
        for name in ("losses", "normalized_weights", "dots", "val_loss", "logits"):
            assert relative(getattr(a, name), getattr(b, name)) < EXACT, name
    for ours, theirs in ((one.model, other.model), (one.selector, other.selector)):
        for name, value in theirs.state_dict().items():
            assert relative(ours.state_dict()[name], value) < EXACT, name


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("schedule", ["exact", "reuse"])
@pytest.mark.parametrize(
    "options",
    [
        {"memory": "low"},
        {"micro_batch": 5},  # 12 samples in 5, 5 and 2; the validation batch in 5 and 4
        {"micro_batch": 5, "engine": "forward_mode"},
        {"micro_batch": 1},
        {"memory": "low", "micro_batch": 6},
        {"engine": "forward_mode"},
    ],
)
def test_options_do_not_change_the_numbers(options, schedule, two_batches, device):
    """Every way of running the passes gives the steps of the fast ghost engine."""
    shared = {"dtype": torch.float64, "online_momentum": 0.9}
    one = StepRun(device, **shared, **{"engine": "ghost", **options}, step_schedule=schedule)
    other = StepRun(device, **shared, engine="ghost", step_schedule=schedule)
    first, second = (
        take_steps(one, two_batches=two_batches),
        take_steps(other, two_batches=two_batches),
    )
    assert_same_run(one, other, first, second)


def test_reuse_steps_with_the_weights_of_row_2(device):
    """The classifier uses the virtual gradient; the selector is updated as in "exact"."""
    reuse, exact = (
        StepRun(device, dtype=torch.float64, step_schedule=s) for s in ("reuse", "exact")
    )
    plain, optimizer = reuse.copy_of_plain_parts()
    arguments = reuse.arguments(0)
    result, expected = reuse.step(**arguments), exact.step(**arguments)
    assert_bitwise(result.dots, expected.dots)
    assert_bitwise(reuse.selector.state_dict(), exact.selector.state_dict())
    # row 2: the selector before its update
    before = StepRun(device, dtype=torch.float64).step.weights(
        **{k: v for k, v in arguments.items() if k != "val_labels"}
    )
    p = before / before.sum()
    assert relative(result.normalized_weights, p) < EXACT
    losses = torch.nn.functional.cross_entropy(
        plain(arguments["inputs"]), arguments["labels"], reduction="none"
    )
    optimizer.zero_grad()
    (p * losses).sum().backward()
    optimizer.step()
    for name, value in plain.state_dict().items():
        assert relative(reuse.model.state_dict()[name], value) < EXACT
    assert relative(expected.normalized_weights, p) > 1e-4  # the exact schedule has others


@pytest.mark.parametrize("schedule", ["exact", "reuse"])
def test_warmup_is_unweighted_in_both_schedules(schedule, device):
    run = StepRun(device, warmup_steps=2, step_schedule=schedule)
    results = take_steps(run, 3)
    assert results[0].normalized_weights.tolist() == pytest.approx([1 / 12] * 12)
    assert results[2].normalized_weights.max() > 1 / 12 + 1e-6


def test_batchnorm_streams_as_data_parallelism_would(device):
    """Statistics move once per micro-batch and step, in order."""
    run = StepRun(
        device, model="batchnorm", dtype=torch.float64, micro_batch=6, online_features=False
    )
    model = copy.deepcopy(run.model)
    arguments = run.arguments(0)
    run.step(**arguments)
    with torch.no_grad():
        for part in arguments["inputs"].split(6):
            model(part)
    assert_bitwise(dict(run.model.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("model", ["mlp", "dropout"])
def test_ghost_leaves_the_trace_of_a_plain_step(model, micro_batch, device):
    """Buffers and generators bitwise; parameters to rounding."""
    run = StepRun(device, model=model, dtype=torch.float64, engine="ghost", micro_batch=micro_batch)
    plain, optimizer = run.copy_of_plain_parts()
    for seed in range(3):
        arguments = run.arguments(seed)
        torch.manual_seed(seed)
        result = run.step(**arguments)
        after = snapshot(device=device)
        torch.manual_seed(seed)
        size = micro_batch or len(arguments["labels"])
        losses = torch.cat(
            [
                torch.nn.functional.cross_entropy(plain(x), y, reduction="none")
                for x, y in zip(
                    arguments["inputs"].split(size), arguments["labels"].split(size), strict=True
                )
            ]
        )
        assert_bitwise(snapshot(device=device), after)
        assert relative(result.losses, losses) < EXACT
        optimizer.zero_grad()
        (result.normalized_weights * losses).sum().backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert relative(run.model.state_dict()[name], value) < EXACT


def counted(run):
    """Counts the samples that the model is run on, by mode."""
    seen = {"train": 0, "eval": 0}
    run.model.register_forward_pre_hook(
        lambda model, args: seen.update(
            {(k := "train" if model.training else "eval"): seen[k] + len(args[0])}
        )
    )
    return seen


@pytest.mark.parametrize(
    ("options", "train", "evaluation"),
    [
        # B = 12 and V = 9: one training forward; V for its features and V for row 5
        ({"engine": "ghost"}, 12, 18),
        ({"engine": "ghost", "step_schedule": "reuse"}, 12, 18),
        ({"engine": "finite_difference"}, 36, 18),
        # dropout: the features need an eval pass of their own
        ({"engine": "ghost", "model": "dropout"}, 12, 30),
        ({"model": "batchnorm"}, 24, 30),  # row 6 by forward mode
        ({"model": "batchnorm", "engine": "double_backward"}, 12, 30),
        # streamed: losses and features, row 3, row 6, row 9
        ({"engine": "ghost", "micro_batch": 4}, 48, 18),
        ({"engine": "ghost", "micro_batch": 4, "online_features": False}, 36, 9),
    ],
)
def test_nothing_is_computed_twice(options, train, evaluation, device):
    run = StepRun(device, **options)
    run.step(**run.arguments(0))  # tests once whether the training forward gives the features
    seen = counted(run)
    run.step(**run.arguments(1))
    assert seen == {"train": train, "eval": evaluation}


def test_features_of_a_shared_forward_are_those_of_eval_mode(device):
    run = StepRun(device, dtype=torch.float64, engine="ghost")
    other = StepRun(device, dtype=torch.float64, engine="ghost")
    other.step._features._shared = _Never()
    assert_same_run(run, other, take_steps(run), take_steps(other))


class _Never(dict):
    """A cache that says of every mode that the training forward cannot be shared."""

    def get(self, _):
        return False


def test_sharing_ends_when_dropout_is_switched_on(device):
    """Only a probability changes, no mode: the step sees it by the random generators' state."""
    run, fresh = (StepRun(device, model="dropout", engine="ghost") for _ in range(2))
    for w in (run, fresh):
        w.model[0].p = 0.0
    run.step(**run.arguments(0))
    fresh.step(**fresh.arguments(0))
    fresh.step._features._shared = _Never()
    for w in (run, fresh):
        w.model[0].p = 0.5
        torch.manual_seed(0)
        w.step(**w.arguments(1))
    assert_bitwise(run.selector.state_dict(), fresh.selector.state_dict())


def test_a_gradient_handed_out_twice_is_clipped_once(device):
    """Two parameters that are only added share one gradient tensor; clipping scales in place."""

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2))

        def forward(self, x):
            return x @ (self.a + self.b).T

    model = Sum().to(device)
    selector = mts_fast.Selector(0, 3).to(device)
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        selector,
        torch.optim.SGD(selector.parameters(), lr=0.1),
        engine="finite_difference",
        online_features=False,
        max_grad_norm=0.1,
    )
    x, y = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 3
    step(x, y, val_inputs=x, val_labels=y)
    norms = [p.grad.norm().item() for p in model.parameters()]
    assert norms == pytest.approx([0.1 / 2**0.5] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_schedule": "lazy"}, ValueError, "schedule must be one of 'exact', 'reuse'"),
        ({"memory": "none"}, ValueError, "memory must be one of 'fast', 'low'"),
        ({"micro_batch": 0}, ValueError, "micro_batch must be a positive int, got 0"),
        (
            {"engine": "ghost", "model": "batchnorm"},
            RuntimeError,
            "engine must be able to serve the model, got 'ghost'; 1: BatchNorm2d in train mode .*"
            "; 4: BatchNorm2d in train mode .*; engine='auto' takes one that serves",
        ),
    ],
)
def test_refused_options(options, error, message):
    with pytest.raises(error, match=f"MTSStep: {message}"):
        StepRun(torch.device("cpu"), **options)


def test_ghost_refuses_a_later_batchnorm_and_changes_nothing(device):
    """The model was in eval mode when the step was built, and is then put in train mode."""
    run = StepRun(device, model="batchnorm", online_features=False)
    run.model.eval()
    selector = mts_fast.Selector(2, 3).to(device)
    step = mts_fast.MTSStep(
        run.model,
        run.optimizer,
        selector,
        torch.optim.AdamW(selector.parameters()),
        engine="ghost",
        online_features=False,
    )
    run.model.train()
    before = snapshot(module=run.model, optimizer=run.optimizer, device=device)
    with pytest.raises(RuntimeError, match="1: BatchNorm2d in train mode"):
        step(**run.arguments(0))
    assert_bitwise(snapshot(module=run.model, optimizer=run.optimizer, device=device), before)
