"""The selector's CUDA graphs: recording, replay and refusals.

On a GPU, steps with graphs are compared with steps without. Elsewhere a recorder that runs the
function again replaces torch.cuda.graph, so that everything but the capture is tested.
"""

import pytest
import torch
from comparison import assert_bitwise, relative
from torch import nn

import mts_fast
from mts_fast.training import selector_trainer_graph as module
from mts_fast.training.capturing import EAGER_CALLS, _check_capturable
from mts_fast.training.selector_trainer_graph import Replayed

CLASSES, FEATURES = 3, 5


class Rerun:
    """A recorder whose replay runs the function on the recorded inputs; counts its calls."""

    def __init__(self):
        self.runs, self.recordings = 0, 0

    def check(self, scorer, optimizer):
        """Accepts every selector and optimizer."""

    def run(self, function, inputs):
        self.runs += 1
        return function(*inputs)

    def record(self, function, inputs):
        self.recordings += 1
        return lambda: function(*inputs)


def twice(x, y):
    return (2 * x + y,)


def test_eager_first_then_one_recording_a_shape():
    recorder = Rerun()
    replayed = Replayed(twice, lambda: None, recorder)
    for i in range(EAGER_CALLS + 3):
        x = torch.full((4,), float(i))
        assert replayed(x, x)[0].tolist() == [3.0 * i] * 4
    assert (recorder.runs, recorder.recordings) == (EAGER_CALLS, 1)
    replayed(torch.ones(5), torch.ones(5))
    assert (recorder.runs, recorder.recordings) == (EAGER_CALLS + 1, 1)


def test_results_are_not_overwritten_and_inputs_not_kept():
    class Static(Rerun):
        """Results are in memory that the next replay overwrites, as with a CUDA graph."""

        def record(self, function, inputs):
            out = torch.empty(4)

            def replay():
                out.copy_(function(*inputs)[0])
                return (out,)

            return replay

    replayed = Replayed(twice, lambda: None, Static())
    x = torch.ones(4)
    for _ in range(EAGER_CALLS):
        replayed(x, x)
    first = replayed(x, x)[0]
    x.fill_(2.0)
    second = replayed(x, x)[0]
    assert first.tolist() == [3.0] * 4 and second.tolist() == [6.0] * 4


def test_recorded_anew_when_what_it_holds_has_changed():
    recorder, state = Rerun(), [0]
    replayed = Replayed(twice, lambda: list(state), recorder)
    x = torch.ones(4)
    for _ in range(EAGER_CALLS + 2):
        replayed(x, x)
    assert recorder.recordings == 1
    state[0] = 1
    replayed(x, x)
    replayed(x, x)
    assert recorder.recordings == 2


@pytest.fixture
def recorder(device, monkeypatch):
    """None on a GPU, which uses its own recorder; elsewhere the replacement."""
    if device.type == "cuda":
        return None
    cuda_recorder = Rerun()
    monkeypatch.setattr(module, "CudaRecorder", lambda: cuda_recorder)
    return cuda_recorder


def make_step(device, *, graph, adam=True, scheduler=False, **options):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)).to(device)
    selector = mts_fast.Selector(4 + FEATURES, CLASSES).to(device)
    lr = torch.tensor(0.05, device=device) if scheduler else 0.05
    make = torch.optim.AdamW if adam else torch.optim.SGD
    capturable = {"capturable": True} if adam and device.type == "cuda" else {}
    optimizer = make(selector.parameters(), lr=lr, **capturable)
    if scheduler:
        options["selector_scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return mts_fast.MTSStep(
        *(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
        *(selector, optimizer),
        cuda_graph=graph,
        **options,
    )


def batches(device, count, size=12):
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        n = size if i != 4 else 7  # a last, smaller batch of an epoch
        x = torch.randn(n, 6, generator=g).to(device)
        yield {
            "inputs": x,
            "labels": (torch.arange(n) % CLASSES).to(device),
            "features": torch.randn(n, FEATURES, generator=g).to(device),
            "is_synthetic": (torch.arange(n) % 2 == 0).to(device),
            "val_inputs": torch.randn(6, 6, generator=g).to(device),
            "val_labels": (torch.arange(6) % CLASSES).to(device),
        }


OPTIONS = {
    "plain": {},
    "sgd": {"adam": False},
    "class_weight": {"class_weight": torch.tensor([1.0, 2.0, 0.5])},
    "scheduler": {"scheduler": True},
    "reuse": {"schedule": "reuse"},
    "every second": {"selector_every": 2, "warmup_steps": 3},
    "gsnr": {"track_gsnr": True},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_without_graphs(name, autocast, device, recorder):
    options = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[name].items()
    }
    steps = [make_step(device, graph=graph, **options) for graph in (True, False)]
    for arguments in batches(device, 9):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            mine, plain = (step(**arguments) for step in steps)
        for field in ("losses", "loss", "logits", "weights", "normalized_weights", "dots", "gsnr"):
            a, b = getattr(mine, field), getattr(plain, field)
            assert (a is None) == (b is None), field
            if a is not None:  # observed 0 with the replacement
                assert relative(a, b) < 1e-5, field
    for a, b in zip(*(step.selector.parameters() for step in steps), strict=True):
        assert relative(a, b) < 1e-5
    if recorder is not None:
        assert recorder.recordings >= 2  # one for forward, one for step
        states = [step.state_dict() for step in steps]
        assert_bitwise(states[0]["selector"], states[1]["selector"])


def test_an_independent_selector_batch(device, recorder):
    steps = [make_step(device, graph=graph) for graph in (True, False)]
    for arguments, other in zip(batches(device, 7), batches(device, 7, size=9), strict=True):
        names = ("inputs", "labels", "features", "is_synthetic")
        second = mts_fast.SelectorBatch(**{n: other[n] for n in names})
        mine, plain = (step(**arguments, selector_batch=second) for step in steps)
        assert relative(mine.dots, plain.dots) < 1e-5
        assert relative(mine.normalized_weights, plain.normalized_weights) < 1e-5


def test_a_loaded_state_is_what_the_next_step_starts_from(device, recorder):
    """Loading puts new tensors into the optimizer; an old recording would use the previous ones."""
    step, other = (make_step(device, graph=graph) for graph in (True, False))
    calls = list(batches(device, 9))
    for arguments in calls[:6]:
        step(**arguments)
        other(**arguments)
    state = other.state_dict()
    for arguments in calls[6:8]:
        step(**arguments)
    step.load_state_dict(state)
    mine, plain = (s(**calls[8]) for s in (step, other))
    assert relative(mine.dots, plain.dots) < 1e-5
    for a, b in zip(*(s.selector.parameters() for s in (step, other)), strict=True):
        assert relative(a, b) < 1e-5


def test_a_changed_learning_rate_is_followed(device, recorder):
    steps = [make_step(device, graph=graph) for graph in (True, False)]
    for i, arguments in enumerate(batches(device, 8)):
        for step in steps:
            step.selector_optimizer.param_groups[0]["lr"] = 0.05 if i < 6 else 0.5
            step(**arguments)
    for a, b in zip(*(step.selector.parameters() for step in steps), strict=True):
        assert relative(a, b) < 1e-5


def test_refused_off_the_gpu():
    message = "cuda_graph must be given with the selector on a GPU, got a selector on cpu; leave"
    with pytest.raises(RuntimeError, match=f"MTSStep: {message}"):
        make_step(torch.device("cpu"), graph=True, adam=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.AdamW, r"AdamW\(capturable=False\); make it with AdamW\(..., capturable=True"),
        (torch.optim.Adagrad, "Adagrad; take SGD, or one of torch's with capturable=True"),
        (
            lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
            r"SGD with lr as a tensor; make it with SGD\(..., fused=True\)",
        ),
    ],
)
def test_refused_optimizers_that_cannot_be_captured(make, message):
    selector = mts_fast.Selector(4, CLASSES)
    expected = f"MTSStep: selector_optimizer must be capturable with cuda_graph, got {message}"
    with pytest.raises(ValueError, match=expected):
        _check_capturable("selector_optimizer", make(selector.parameters()))


def test_a_selector_on_the_cpu_is_refused_before_its_optimizer():
    selector = mts_fast.Selector(4, CLASSES)
    with pytest.raises(RuntimeError, match="cuda_graph must be given with the selector on a GPU"):
        build(torch.device("cpu"), selector, torch.optim.AdamW(selector.parameters()))


def test_refused_learning_rates_that_a_scheduler_would_change_in_vain(device, recorder):
    selector = mts_fast.Selector(4, CLASSES).to(device)
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    message = r"selector_optimizer must be given lr as a tensor .*SGD\(\.\.\., lr=torch.tensor"
    with pytest.raises(ValueError, match=f"MTSStep: {message}"):
        build(device, selector, optimizer, selector_scheduler=schedule)


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2, dropout=0.1)]
)
def test_refused_layers_that_a_second_forward_changes(layer, device, recorder):
    selector = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 1)).to(device)
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"selector must be free of dropout and .*\['1'\]"):
        build(device, selector, optimizer)


def test_class_weights_follow_the_selector(device, recorder):
    """Class weights set between steps move to the device: a graph cannot copy from the host."""
    step = make_step(device, graph=True, class_weight=torch.ones(CLASSES))
    assert step.class_weight.device.type == device.type
    step.class_weight = torch.zeros(CLASSES)
    assert step.class_weight.device.type == device.type


def build(device, selector, optimizer, **options):
    model = nn.Linear(6, CLASSES).to(device)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return mts_fast.MTSStep(model, sgd, selector, optimizer, cuda_graph=True, **options)
