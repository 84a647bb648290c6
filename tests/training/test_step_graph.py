"""A whole step as one CUDA graph: replays equal steps without one, bit for bit.

Without a GPU a tape of operators stands in for the graph (tests/helpers/tape.py): it freezes
numbers and memory as a capture does, and refuses what waits for the device. What it cannot show,
the capture itself and the generators' registration, is compared on a GPU.
"""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, snapshot
from small_steps import CLASSES, batch, plain_model
from tape import TapeRecorder
from torch import nn

import mts_fast
from mts_fast.training import step_graph
from mts_fast.training.capturing import EAGER_CALLS
from mts_fast.training.result import StepResult

CALLS = 14
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Convolutions(nn.Module):
    """BatchNorm, whose statistics move in every call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.b = nn.Linear(16, CLASSES)
        self.double()

    def forward(self, x):
        return self.b(self.norm(self.a(x[:, None])).relu().flatten(1))


class Dropping(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(p), nn.Linear(8, CLASSES)).double()

    def forward(self, x):
        return self.layers(x)


class Scores(nn.Module):
    """A selector that reads no values on the host, as `Selector` does where they are on a CPU."""

    def __init__(self, num_features=0):
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(CLASSES, 4)
        self.layers = nn.Sequential(nn.Linear(5 + num_features, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()

    def forward(self, features, classes, is_synthetic):
        flags = is_synthetic.double()[:, None]
        return self.layers(torch.cat([self.table(classes), flags, features], 1))[:, 0]


def losses(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


@pytest.fixture
def recorder(monkeypatch):
    """The recorder of all steps that the test makes; on a GPU the real one."""
    if GPU:
        recorder = step_graph.CudaRecorder()
        recorder.recordings = recorder.replays = 0
        record = recorder.record

        def counted(function, inputs):
            recorder.recordings += 1
            replay = record(function, inputs)

            def run():
                recorder.replays += 1
                return replay()

            return run

        recorder.record = counted
    else:
        recorder = TapeRecorder()
    monkeypatch.setattr(step_graph, "CudaRecorder", lambda: recorder)
    return recorder


def make(model, *, graph, optimizer="sgd", selector=None, scheduled=False, **options):
    model = copy.deepcopy(model).to(DEVICE)
    torch.manual_seed(1)
    selector = copy.deepcopy(selector or Scores()).to(DEVICE)
    make_optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    }[optimizer]
    # the loss of a step reads labels that are on a CPU, to check them
    options = {"online_features": False, "check": "never", "loss": losses} | options
    selector_optimizer = torch.optim.SGD(selector.parameters(), lr=0.05, momentum=0.9)
    if scheduled:
        rate = torch.tensor(0.05, dtype=torch.float64, device=DEVICE)
        selector_optimizer = torch.optim.SGD(selector.parameters(), lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.StepLR(selector_optimizer, 3, gamma=0.5)
        options["selector_scheduler"] = schedule
    return mts_fast.MTSStep(
        model,
        make_optimizer(model.parameters()),
        selector,
        selector_optimizer,
        cuda_graph="step" if graph else False,
        **options,
    )


def on_device(values):
    return {name: value.to(DEVICE) for name, value in values.items()}


def run(step, calls=CALLS, first=0):
    return [step(**on_device(batch(first + seed))) for seed in range(calls)]


def state_of(step):
    device = DEVICE.type
    state = snapshot(module=step.model, optimizer=step.optimizer, device=device, gradients=True)
    state["selector"] = snapshot(
        module=step.selector, optimizer=step.selector_optimizer, device=device
    )
    state["step"] = copy.deepcopy(step.state_dict())
    return state


def tensors_of(result: StepResult):
    return {n: v for n, v in vars(result).items() if isinstance(v, torch.Tensor)}


def assert_equal_runs(model, recorder, calls=CALLS, replayed=None, **options):
    torch.manual_seed(5)
    plain = make(model, graph=False, **options)
    expected = run(plain, calls)
    after = state_of(plain)
    torch.manual_seed(5)
    graphed = make(model, graph=True, **options)
    results = run(graphed, calls)
    assert_bitwise(state_of(graphed), after)
    for result, one in zip(results, expected, strict=True):
        assert_bitwise(tensors_of(result), tensors_of(one))
        assert result.engine == one.engine
    if replayed is not None:
        assert recorder.replays == replayed
    return graphed


def expected_replays(calls):
    """All but the eager calls before a recording, the first of all, and calls 1, 2, 4, 8, ..."""
    probing = {1, 2, 4, 8, 16}
    eager = replays = 0
    for call in range(1, calls + 1):
        if call in probing or eager < EAGER_CALLS:
            eager += 1
        else:
            replays += 1
    return replays


OPTIONS = {
    "exact": {},
    "reuse": {"schedule": "reuse"},
    "low memory": {"memory": "low"},
    "clipped": {"max_grad_norm": 0.1},
    "online features": {
        "online_features": True,
        "selector": Scores(4),
    },
    "running online features": {
        "online_features": True,
        "online_momentum": 0.9,
        "selector": Scores(4),
    },
    "micro-batches": {"micro_batch": 5},
    "differences": {"engine": "finite_difference"},
    "double backward": {"engine": "double_backward"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_replays_equal_steps_without_a_graph(name, recorder):
    assert_equal_runs(plain_model(), recorder, replayed=expected_replays(CALLS), **OPTIONS[name])
    assert recorder.recordings == 1


@pytest.mark.parametrize("schedule", ["exact", "reuse"])
def test_batch_norm_moves_its_statistics(schedule, recorder):
    assert_equal_runs(Convolutions(), recorder, schedule=schedule, replayed=expected_replays(CALLS))


@pytest.mark.skipif(not GPU, reason="values of a class_weight on a CPU are read")
def test_class_weight(recorder):
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, device=DEVICE)
    assert_equal_runs(
        plain_model(), recorder, class_weight=weight, replayed=expected_replays(CALLS)
    )


@pytest.mark.skipif(not GPU, reason="a capturable AdamW needs a GPU")
def test_adamw(recorder):
    assert_equal_runs(plain_model(), recorder, optimizer="adamw", replayed=expected_replays(CALLS))


@pytest.mark.skipif(not GPU, reason="on a CPU dropout draws on the host, which no graph holds")
def test_dropout_draws_as_it_would(recorder):
    assert_equal_runs(Dropping(), recorder, replayed=expected_replays(CALLS))


def test_warm_up_and_calls_that_leave_the_selector_alone(recorder):
    """Each kind of call has a recording of its own; warm-up ends before it has one."""
    options = {"warmup_steps": 6, "selector_every": 2}
    assert_equal_runs(plain_model(), recorder, calls=24, **options)
    assert recorder.recordings == 2 and recorder.replays > 8


def test_a_schedule_of_the_selector_goes_on(recorder):
    assert_equal_runs(plain_model(), recorder, replayed=expected_replays(CALLS), scheduled=True)


def test_results_are_kept(recorder):
    step = make(plain_model(), graph=True)
    run(step, 6)
    one = step(**on_device(batch(50)))
    before = copy.deepcopy(tensors_of(one))
    step(**on_device(batch(51)))
    assert_bitwise(tensors_of(one), before)
    assert recorder.replays >= 2


def test_another_shape_is_recorded_by_itself(recorder):
    step = make(plain_model(), graph=True)
    run(step, 6)
    short = {name: value[:5] for name, value in on_device(batch(0)).items()}
    for _ in range(EAGER_CALLS + 3):
        step(**short)
    assert recorder.recordings == 2


def test_a_loaded_state_is_recorded_anew(recorder):
    """Its tensors lie elsewhere."""
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    run(step), run(plain)
    step.load_state_dict(plain.state_dict())
    made = recorder.recordings
    run(step, 4, first=20), run(plain, 4, first=20)
    assert recorder.recordings > made
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())
    assert_bitwise(step.selector.state_dict(), plain.selector.state_dict())


def test_a_rate_that_keeps_changing_is_given_up(recorder, caplog):
    """Every change makes a recording, which costs more than a step."""
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    with caplog.at_level(logging.WARNING, "mts_fast"):
        for seed in range(CALLS):
            for one in (step, plain):
                one.optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
                one(**on_device(batch(seed)))
    assert recorder.recordings == step_graph.MOST_RECORDINGS
    assert (
        caplog.text.count("runs without a graph") == 1 and "the same in every call" in caplog.text
    )
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())


class Replacing(nn.Module):
    """Puts a new tensor in the place of a buffer in every training forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, CLASSES).double()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.a(x - self.mean)


def test_a_buffer_that_is_replaced_is_no_constant(recorder, caplog):
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert_equal_runs(Replacing(), recorder, replayed=0)
    assert "written in place" in caplog.text


def test_options_that_are_set_between_calls_are_followed(recorder):
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    run(step, 6), run(plain, 6)
    for one in (step, plain):
        one.hypergradient_lr, one.max_grad_norm = 0.5, 0.01
    run(step, 5, first=6), run(plain, 5, first=6)
    assert recorder.recordings == 2
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())
    assert_bitwise(step.selector.state_dict(), plain.selector.state_dict())


class Waiting(nn.Module):
    """Reads a value in its forward, which a capture refuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, CLASSES).double()

    def forward(self, x):
        return self.a(x) * (2.0 if x.sum().item() > 0 else 1.0)


def test_what_cannot_be_recorded_runs_without_and_says_why(recorder, caplog):
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert_equal_runs(Waiting(), recorder, replayed=0)
    assert caplog.text.count("runs without a graph") == 1 and "captur" in caplog.text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"check": "always"}, "its values are checked"),
        ({"compute": 6}, "it computes a part of its batch"),
        ({"track_gsnr": True}, "track_gsnr"),
    ],
)
def test_reasons(options, why, recorder, caplog):
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert_equal_runs(plain_model(), recorder, replayed=0, **options)
    assert caplog.text.count("runs without a graph") == 1 and why in caplog.text


@pytest.mark.skipif(GPU, reason="there dropout draws on the device")
def test_numbers_drawn_on_the_host_are_no_constants(recorder, caplog):
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert_equal_runs(Dropping(), recorder, replayed=0)
    assert "draws random numbers on the host" in caplog.text


def test_hooks_of_the_optimizer_still_run(recorder, caplog):
    step = make(plain_model(), graph=True)
    seen = []
    step.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "mts_fast"):
        run(step)
    assert len(seen) == CALLS and "the optimizer has hooks" in caplog.text


def test_an_interrupted_recording_leaves_nothing(recorder, monkeypatch):
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    run(step, 4), run(plain, 4)
    before = state_of(step)

    def interrupted(function, inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(**on_device(batch(4)))
    assert_bitwise(state_of(step), before)
    monkeypatch.undo()
    run(step, 6, first=4), run(plain, 6, first=4)
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())


def test_options_that_are_wrong():
    with pytest.raises(TypeError, match="cuda_graph must be True, False or 'step', got str 'all'"):
        mts_fast.MTSStep(None, None, None, None, cuda_graph="all")


@pytest.mark.skipif(GPU, reason="the model is on a GPU")
def test_a_graph_needs_a_gpu():
    expected = "cuda_graph must be given with the model on a GPU, got a model on cpu; leave it out"
    with pytest.raises(RuntimeError, match=expected):
        make(plain_model(), graph=True)
