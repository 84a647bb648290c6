"""A call of MTSStep changes what one plain weighted step changes; a failed call, nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, generators, set_generators, snapshot
from step_run import StepRun

import mts_fast
from mts_fast.hypergradient import ENGINES, Objective


@pytest.fixture(autouse=True)
def deterministic():
    """Bitwise claims need kernels that sum in one order."""
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield


def build(device, engine, *, model="dense", **options):
    """A StepRun whose model has BatchNorm; skips engines that refuse it."""
    run = StepRun(device, model=model, **options)
    why = ENGINES[engine](Objective(run.model), list(run.model.parameters())).reasons()
    if why:
        pytest.skip("; ".join(why))
    return StepRun(device, model=model, engine=engine, **options)


def plain_step(model, optimizer, x, y, p):
    """One step of a training loop with fixed weights."""
    optimizer.zero_grad()
    losses = F.cross_entropy(model(x), y, reduction="none")
    (p * losses).sum().backward()
    optimizer.step()
    return losses.detach()


def assert_equals_plain_run(run, *, steps=3, two_batches=False):
    """Compare steps bitwise with plain steps that use the same sample weights."""
    plain = run.copy_of_plain_parts()
    state = generators(run.device)
    for seed in range(steps):
        arguments = run.arguments(seed, two_batches=two_batches)
        set_generators(state)
        result = run.step(**arguments)
        traced = trace(run.model, run.optimizer, run.device)
        # the caller's tensors are as they were drawn
        untouched = run.arguments(seed, two_batches=two_batches)
        assert_bitwise(
            [vars(v) if name == "selector_batch" else v for name, v in arguments.items()],
            [vars(v) if name == "selector_batch" else v for name, v in untouched.items()],
        )
        set_generators(state)
        p = result.normalized_weights
        assert 0 < p.min() < p.max() < 1
        losses = plain_step(*plain, arguments["inputs"], arguments["labels"], p)
        expected = trace(*plain, run.device)
        assert_bitwise(traced, expected)
        assert_bitwise(result.losses, losses)
        state = expected["generators"]


def trace(model, optimizer, device):
    return snapshot(module=model, optimizer=optimizer, device=device, gradients=True)


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("validation_mode", ["eval", "train"])
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["dense", "convolutional"])  # both with BatchNorm and dropout
def test_trace_is_that_of_a_plain_step(
    model, engine, optimizer, validation_mode, two_batches, device
):
    run = build(device, engine, model=model, optimizer=optimizer, validation_mode=validation_mode)
    assert_equals_plain_run(run, two_batches=two_batches)


@pytest.mark.parametrize(
    "options",
    [
        {"selector_every": 2},
        {"online_features": False},
        {"online_momentum": 0.9},
        {"track_gsnr": True},
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_trace_with_options(engine, options, device):
    """Each option takes another path through the step, with fewer or more forwards."""
    run = build(device, engine, **options)
    assert_equals_plain_run(run)


@pytest.mark.parametrize("validation_mode", ["eval", "train"])
@pytest.mark.parametrize("engine", ENGINES)
def test_modules_keep_their_own_modes(engine, validation_mode, device):
    """A BatchNorm that was frozen in eval mode, inside a model in train mode, stays frozen."""
    run = build(device, engine, validation_mode=validation_mode)
    frozen = run.model[1].eval()
    before = copy.deepcopy(frozen.state_dict())
    assert_equals_plain_run(run)
    assert not frozen.training and run.model.training and run.model[3].training
    assert torch.equal(frozen.running_mean, before["running_mean"])
    assert torch.equal(frozen.num_batches_tracked, before["num_batches_tracked"])


@pytest.mark.parametrize("engine", ENGINES)
def test_model_in_eval_mode(engine, device):
    """Fine-tuning without dropout and with fixed statistics: nothing but parameters moves."""
    run = build(device, engine)
    run.model.eval()
    before = snapshot(device=device), {n: b.clone() for n, b in run.model.named_buffers()}
    assert_equals_plain_run(run)
    assert_bitwise((snapshot(device=device), dict(run.model.named_buffers())), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_change_nothing(engine, device):
    """Scoring samples changes nothing, running statistics included."""
    run = build(device, engine, online_momentum=0.5)
    run.step(**run.arguments(0))
    before = everything(run)
    arguments = run.arguments(1)
    del arguments["val_labels"]
    assert run.step.weights(**arguments).shape == (12,)
    assert_bitwise(everything(run), before)


def everything(run):
    """All that a failed call must leave as it was."""
    return copy.deepcopy(
        (
            snapshot(module=run.model, optimizer=run.optimizer, device=run.device, gradients=True),
            snapshot(module=run.selector, optimizer=run.selector_optimizer, gradients=True),
            run.step.state_dict()["online"],
            run.step.steps,
        )
    )


def nan(tensor):
    broken = tensor.clone()
    broken[3] = torch.nan
    return broken


# errors of a data loader, one argument at a time
BAD_ARGUMENTS = {
    "nan_inputs": ("inputs", nan, "the loss of every training sample must be finite"),
    "nan_features": ("features", nan, r"features must be finite, got NaN .* 1 rows \(3\)"),
    "nan_val_inputs": ("val_inputs", nan, "the selector's input must be finite"),
    "labels_out_of_range": ("labels", lambda y: y + 1, r"MTSStep: labels must be in \[0, 3\)"),
    "val_labels_out_of_range": (
        "val_labels",
        lambda y: y + 1,
        r"MTSStep: val_labels must be in \[0, 3\)",
    ),
    "empty_batch": ("labels", lambda y: y[:0], "labels must be non-empty"),
    "empty_validation": ("val_labels", lambda y: y[:0], "val_labels must be non-empty"),
    "short_labels": ("labels", lambda y: y[:-1], "inputs must be of length 11, as labels"),
    "short_val_labels": ("val_labels", lambda y: y[:-1], "val_inputs must be of length 8"),
    "short_features": ("features", lambda h: h[:-1], "features must be of length 12"),
    "narrow_features": ("features", lambda h: h[:, 1:], r"features must be \[B, 6\]"),
    "inputs_of_another_width": ("inputs", lambda x: x[:, 1:], "mat1 and mat2"),
}


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_bad_arguments_change_nothing(engine, case, two_batches, device):
    argument, breaks, message = BAD_ARGUMENTS[case]
    run = build(device, engine, online_momentum=0.9, check="always")
    run.step(**run.arguments(0))
    arguments = run.arguments(1, two_batches=two_batches)
    arguments[argument] = breaks(arguments[argument])
    before = everything(run)
    with pytest.raises((ValueError, RuntimeError), match=message):
        run.step(**arguments)
    assert_bitwise(everything(run), before)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x, y, h: (nan(x), y, h), "the selector's input must be finite"),
        (lambda x, y, h: (x, y, nan(h)), "selector_batch.features must be finite"),
        (lambda x, y, h: (x, y + 1, h), "selector_batch.labels must be in"),
        (lambda x, y, h: (x[:-1], y, h), "selector_batch.inputs must be of length 12"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_bad_selector_batch_changes_nothing(engine, broken, message, device):
    run = build(device, engine, online_momentum=0.9, check="always")
    run.step(**run.arguments(0))
    before = everything(run)
    batch = mts_fast.SelectorBatch(*broken(*run.draw(2000)[:3]))
    with pytest.raises(ValueError, match=message):
        run.step(**run.arguments(1), selector_batch=batch)
    assert_bitwise(everything(run), before)


# common mistakes: a mean over the batch, and a loss per class
WRONG_LOSSES = {
    "mean": F.cross_entropy,
    "per_class": lambda output, _: -output.log_softmax(1),
}


@pytest.mark.parametrize("loss", WRONG_LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_loss_of_a_wrong_shape_changes_nothing(engine, loss, device):
    run = build(device, engine, loss=WRONG_LOSSES[loss])
    before = everything(run)
    with pytest.raises(ValueError, match=r"loss\(output, labels\) must be a tensor of shape"):
        run.step(**run.arguments(1))
    assert_bitwise(everything(run), before)


@pytest.mark.parametrize("two_batches", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_failure_in_any_forward_changes_nothing(engine, two_batches, device):
    """Out of memory in the n-th forward of the step, after its BatchNorms have been updated."""
    run = build(device, engine, online_momentum=0.9)
    arguments = run.arguments(1, two_batches=two_batches)
    run.step(**run.arguments(0))
    left = []

    def fail_when_due(*_):
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError

    run.model[-1].register_forward_hook(fail_when_due)
    before = everything(run)
    failures = 0
    for n in range(1, 20):
        left[:] = [n]
        try:
            run.step(**arguments)
        except MemoryError:
            failures += 1
            assert_bitwise(everything(run), before)
        else:
            break
    # features of two or three batches, rows 3 and 5, and one for dots that need another forward
    assert failures >= (6 if two_batches else 4 if engine == "double_backward" else 5)
    assert run.step.steps == 2
