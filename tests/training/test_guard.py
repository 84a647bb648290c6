"""Dots are checked against the gradient before any update; "auto" picks a correct engine."""

import logging

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from interruptions import differences, whole_state
from step_run import StepRun
from torch import nn

import mts_fast
from mts_fast.hypergradient import ENGINES, Refused
from mts_fast.hypergradient.choice import EngineChoice
from mts_fast.hypergradient.forward_mode import ForwardMode
from mts_fast.hypergradient.ghost.linearization import StoredLinearization

CPU = torch.device("cpu")


class Ternary(nn.Module):
    """Straight-through weights: autograd's gradient is not the derivative of the forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        w = self.a.weight
        return self.b(torch.tanh(F.linear(x, w + (w.sign() - w).detach(), self.a.bias)))


class Reversal(torch.autograd.Function):
    """Gradient reversal, as in domain-adversarial training; has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, b):
        return -b


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        return self.b(Reversal.apply(torch.tanh(self.norm(self.a(x)))))


class Target(nn.Module):
    """A detached target from the model itself, as in bootstrapping; BatchNorm couples samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        z = self.b(torch.tanh(self.norm(self.a(x))))
        return z * z.detach().square()


def build(model, **options):
    torch.manual_seed(1)
    selector = mts_fast.Selector(0, 3, hidden=(8,)).to(next(model.parameters()).dtype)
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.01),
        online_features=False,
        **options,
    )


def batch(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 4, generator=g, dtype=dtype)
    y = torch.randint(3, (20,), generator=g)
    return {"inputs": x[:12], "labels": y[:12], "val_inputs": x[12:], "val_labels": y[12:]}


def true_dots(step, arguments):
    """d_i by double backward through one plain SGD step."""
    model = step.model
    w = step.weights(arguments["inputs"], arguments["labels"], val_inputs=arguments["val_inputs"])
    p = (w / w.sum()).requires_grad_()
    theta = dict(model.named_parameters())
    losses = F.cross_entropy(
        torch.func.functional_call(model, {**theta, **clones(model)}, arguments["inputs"]),
        arguments["labels"],
        reduction="none",
    )
    g = torch.autograd.grad((p * losses).sum(), list(theta.values()), create_graph=True)
    buffers = clones(model)
    torch.func.functional_call(model, {**theta, **buffers}, arguments["inputs"])
    ahead = {n: t - 0.1 * d for (n, t), d in zip(theta.items(), g, strict=True)}
    model.eval()
    z = torch.func.functional_call(model, {**ahead, **buffers}, arguments["val_inputs"])
    model.train()
    (d,) = torch.autograd.grad(F.cross_entropy(z, arguments["val_labels"]), p)
    return -d


def clones(model):
    return {n: b.clone() for n, b in model.named_buffers()}


# model -> (engine that "auto" picks, explicit engines that the check refuses)
WRONG = {
    Ternary: ("ghost", ["finite_difference"]),
    Adversarial: ("double_backward", ["finite_difference"]),
    Target: ("forward_mode", ["finite_difference"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_auto_takes_an_engine_that_is_right(kind):
    step = build(kind())
    for seed in range(3):
        arguments = batch(seed)
        expected = true_dots(step, arguments)
        result = step(**arguments)
        assert result.engine == WRONG[kind][0]
        assert relative(result.dots, expected) < 1e-10 and result.self_check < 1e-10


@pytest.mark.parametrize("kind", WRONG)
def test_an_explicit_engine_beyond_its_bound_raises(kind):
    for engine in WRONG[kind][1]:
        model = kind()
        step = build(model, engine=engine)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(Refused, match=r"sum p d differs from <kappa v, grad L> by .*allowed"):
            step(**batch())
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert step.steps == 0


def wrong_in_call(monkeypatch, number, factor=1.5):
    """Makes ghost's dots wrong in the call of that number."""
    calls = []
    right = StoredLinearization.dots

    def dots(self, direction):
        calls.append(1)
        return right(self, direction) * (factor if len(calls) == number else 1.0)

    monkeypatch.setattr(StoredLinearization, "dots", dots)


def messages(caplog, level):
    """Log messages of that level about engines, without those about the backends of ops."""
    said = [r.getMessage() for r in caplog.records if r.levelno == level and r.name == "mts_fast"]
    return [m for m in said if "runs on backend" not in m]


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_probing_call_repeats_the_step_with_the_next_engine(number, monkeypatch, caplog):
    """The change is logged, and the numbers are those of a run with that engine."""
    wrong_in_call(monkeypatch, number)
    step, other = build(plain()), build(plain(), engine="forward_mode")
    with caplog.at_level(logging.INFO, "mts_fast"):
        for seed in range(5):
            result, expected = step(**batch(seed)), other(**batch(seed))
            assert result.engine == ("ghost" if seed + 1 < number else "forward_mode")
            assert relative(result.dots, expected.dots) < 1e-12
    level = logging.INFO if number == 1 else logging.WARNING
    said = [m for m in messages(caplog, level) if "forward_mode, since ghost: sum p d" in m]
    assert len(said) == 1


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_between_probing_calls_the_next_call_warns(monkeypatch, caplog):
    wrong_in_call(monkeypatch, 3)
    step = build(plain())
    with caplog.at_level(logging.WARNING, "mts_fast"):
        for seed in range(3):
            step(**batch(seed))
        assert not messages(caplog, logging.WARNING)
        step(**batch(3))
    (said,) = messages(caplog, logging.WARNING)
    assert "dots of engine ghost in the last call missed" in said


def test_a_selector_batch_is_guarded_in_probing_calls(monkeypatch):
    from mts_fast.hypergradient.ghost.linearization import LowMemoryLinearization

    calls = []
    for kind in (StoredLinearization, LowMemoryLinearization):
        right = kind.dots
        monkeypatch.setattr(
            kind, "dots", lambda self, d, right=right: calls.append(1) or right(self, d) * 1.5
        )
    step = build(plain())
    arguments, other = batch(0), batch(1)
    extra = mts_fast.SelectorBatch(other["inputs"], other["labels"])
    assert step(**arguments, selector_batch=extra).engine == "forward_mode" and calls


def test_the_choice_is_kept_in_the_state(monkeypatch):
    wrong_in_call(monkeypatch, 2)
    step = build(plain())
    for seed in range(3):
        step(**batch(seed))
    state = step.state_dict()
    (choice,) = state["engines"].values()
    assert choice["engine"] == "forward_mode" and choice["calls"] == 2
    other = build(plain())
    other.load_state_dict(state)
    for seed in range(3, 5):
        result, expected = other(**batch(seed)), step(**batch(seed))
        assert result.engine == "forward_mode" and torch.equal(result.dots, expected.dots)


def test_a_failed_call_never_changes_the_choice(monkeypatch):
    """The engine was refused, and then the call failed for another reason."""
    wrong_in_call(monkeypatch, 1)
    run = StepRun(CPU, online_features=False)
    before = whole_state(run)
    handle = run.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.step(**run.arguments(0))
    handle.remove()
    assert not differences(before, whole_state(run))
    assert run.step(**run.arguments(0)).engine == "ghost"


def test_layouts_are_chosen_apart():
    """A layout that ghost refuses does not change the engine of other layouts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.double()

        def forward(self, x, mix=None):
            h = torch.tanh(self.a(x))
            return self.b(h if mix is None else h - h.mean(0))

    step = build(Model())
    arguments = batch()
    mixed = {**arguments, "inputs": {"x": arguments["inputs"], "mix": torch.ones(12)}}
    engines = []
    for call in (arguments, mixed, arguments, mixed, arguments):
        call = {**call, "val_inputs": arguments["val_inputs"]}
        engines.append(step(**call).engine)
    assert engines == ["ghost", "forward_mode", "ghost", "forward_mode", "ghost"]


class Own(nn.Module):
    """Raises in the n-th forward, whichever engine runs it."""

    def __init__(self, raises_at):
        super().__init__()
        self.body, self.left = plain(), raises_at

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("of the model's own")
        return self.body(x)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_an_error_of_the_model_is_no_reason_against_an_engine(engine):
    raised = 0
    for n in range(1, 9):
        model = Own(n)
        step = build(model, engine=engine)
        try:
            step(**batch())
        except RuntimeError as error:
            assert str(error) == "of the model's own"
            raised += 1
    assert raised >= 2


def test_when_none_serves_all_reasons_are_told(monkeypatch):
    class Refusing(nn.Module):
        """bf16 parameters and an op without any further derivative."""

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))

        def forward(self, x):
            return Once.apply(x.bfloat16() @ self.w).float()

    step = build(Refusing())
    with pytest.raises(RuntimeError, match="model must be served by an engine") as seen:
        step(**batch(0, torch.float32))
    for name in ENGINES:
        assert f"{name}: " in str(seen.value)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, b):
        return b - b.mean(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_are_never_taken_in_16_bits(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    step = build(model)
    other = build(model, engine="finite_difference")
    with torch.autocast("cpu", dtype):
        result = step(**batch(0, torch.float32))
        assert result.engine in ("forward_mode", "double_backward")
        with pytest.raises(Refused, match="drown in rounding under 16-bit autocast"):
            other(**batch(0, torch.float32))


def test_forward_mode_is_not_asked_for_what_it_cannot():
    """An explicit engine says why it cannot serve when the step is built."""
    model = nn.LSTM(2, 4)
    with pytest.raises(Refused, match="is a LSTM, whose weights cannot be swapped"):
        EngineChoice(mts_fast.hypergradient.Objective(model), [*model.parameters()], "forward_mode")
    assert ForwardMode.name in ENGINES
