"""A whole step as one CUDA graph: replays equal steps without one, bit for bit.

Without a GPU a tape of operators stands in for the graph (tests/helpers/tape.py): it freezes
numbers and memory as a capture does, and refuses what waits for the device. What it cannot show,
the capture itself and the generators' registration, is compared on a GPU.
"""

import copy
import dataclasses
import logging

import pytest
import torch
from comparison import assert_bitwise
from graphed_steps import (
    CALLS,
    DEVICE,
    GPU,
    Convolutions,
    Dropping,
    Scores,
    make,
    on_device,
    run,
    state_of,
    tensors_of,
)
from small_steps import CLASSES, batch, plain_model
from tape import TapeRecorder
from torch import nn

import mts_fast
from mts_fast.training import step_graph
from mts_fast.training.capturing import EAGER_CALLS


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
    "clipped virtual step": {"max_grad_norm": 0.1, "clip_virtual_step": True},
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
    run(step, 6, first=20), run(plain, 6, first=20)
    assert recorder.recordings > made
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())
    assert_bitwise(step.selector.state_dict(), plain.selector.state_dict())


def test_a_rate_that_keeps_changing_is_given_up(recorder, caplog):
    """Every change makes a recording, which costs more than a step."""
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    with caplog.at_level(logging.WARNING, "mts_fast"):
        for seed in range(20):
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
    assert len(seen) == CALLS and "an optimizer has hooks" in caplog.text


def test_hooks_of_the_selectors_optimizer_still_run(recorder):
    step = make(plain_model(), graph=True)
    seen = []
    step.selector_optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    run(step)
    assert len(seen) == CALLS and recorder.replays == 0


def test_another_engine_has_a_recording_of_its_own(recorder):
    """One that the guard has refused is not replayed."""
    step = make(plain_model(), graph=True)
    assert run(step, 6)[-1].engine == "ghost" and recorder.replays == 2
    for layout, choice in list(step._engines._choices.items()):
        refused = dataclasses.replace(choice, engine="double_backward", calls=4)
        step._engines._choices[layout] = refused
    results = run(step, 5, first=6)
    assert {result.engine for result in results} == {"double_backward"}
    assert recorder.recordings == 2


def test_a_state_that_is_cleared_is_made_without_a_graph(recorder):
    """Made within one, momentum would begin anew in every replay."""
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    run(step, 6), run(plain, 6)
    for one in (step, plain):
        one.optimizer.state.clear()
    run(step, 7, first=6), run(plain, 7, first=6)
    assert recorder.recordings == 2
    assert_bitwise(state_of(step)["optimizer"], state_of(plain)["optimizer"])
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())


def test_gradients_are_those_of_the_last_call(recorder):
    """Also the selector's, which a call without a graph had replaced."""
    step, plain = make(plain_model(), graph=True), make(plain_model(), graph=False)
    run(step, 10), run(plain, 10)
    assert recorder.replays > 2
    for one, other in ((step.model, plain.model), (step.selector, plain.selector)):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert_bitwise(*map(list, zip(*((p.grad, q.grad) for p, q in pairs), strict=True)))


class Pair(dict):
    """A mapping that is not a dict: its tensors are not listed."""


class OnPair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, CLASSES).double()

    def forward(self, x):
        return self.a(x)


def test_inputs_whose_tensors_are_not_seen_are_not_recorded(recorder, caplog):
    step, plain = make(OnPair(), graph=True), make(OnPair(), graph=False)
    with caplog.at_level(logging.WARNING, "mts_fast"):
        for seed in range(8):
            values = on_device(batch(seed))
            values["inputs"] = Pair(x=values["inputs"])
            values["val_inputs"] = Pair(x=values["val_inputs"])
            for one in (step, plain):
                one(**values)
    assert recorder.replays == 0 and "'Pair'" in caplog.text
    assert_bitwise(step.model.state_dict(), plain.model.state_dict())


def test_inputs_that_need_gradients_keep_no_graph_alive(recorder):
    step = make(plain_model(), graph=True)
    for seed in range(8):
        values = on_device(batch(seed))
        step(**values | {"inputs": (values["inputs"] * 1).requires_grad_()})
    (recording,) = step._graph._recorded.values()
    assert all(t.grad_fn is None for t in recording.inputs) and recorder.replays > 2


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
