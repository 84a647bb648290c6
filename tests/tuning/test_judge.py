"""Judging kernels with a clock of the test's own: right results first, then times; and the verb."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mts_fast.backends import registry
from mts_fast.backends.verdicts import table
from mts_fast.backends.verdicts.requests import Request, record_requests
from mts_fast.cli.main import main
from mts_fast.tuning import judge as judge_module
from mts_fast.tuning.cases import _MAKERS, case_of
from mts_fast.tuning.judge import judge, relative_error
from mts_fast.tuning.run import tune
from mts_fast.tuning.timing import DeviceTimes, interleaved, on_device

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
REQUEST = Request.of("cross_entropy", "", [X])


@pytest.fixture
def only_cpp(monkeypatch):
    """C++ is judged alone; in tests Triton's interpreter could serve, too."""
    tunable = judge_module.tunable
    monkeypatch.setattr(
        judge_module, "tunable", lambda *call: tuple(b for b in tunable(*call) if b == "cpp")
    )


class Clock:
    """Calls take the seconds that it is told; the host's times are another list."""

    def __init__(self, ours, rival=1.0, *, spread=0.0, host=(0.0, 0.0)):
        self.seconds, self.spread = {"ours": ours, "rival": rival}, spread
        self.host, self.turns = dict(zip(("ours", "rival"), host, strict=True)), 0

    def __call__(self, calls, rounds, device):
        self.turns += 1
        for call in calls.values():
            call()
        noise = [1 + self.spread * (i % 3 - 1) for i in range(rounds)]
        times = {label: [s * n for n in noise] for label, s in self.seconds.items()}
        return DeviceTimes(times, {label: [s] * rounds for label, s in self.host.items()})


@pytest.mark.parametrize(
    ("clock", "wins", "why"),
    [
        (Clock(0.5), True, ""),
        (Clock(0.94), True, ""),
        (Clock(0.96), False, "0.96 of the rival's time"),
        (Clock(2.0), False, "2.00 of the rival's time"),
    ],
)
def test_the_clock_decides(clock, wins, why, only_cpp):
    verdict = judge(REQUEST, CPU, clock)["cpp"]
    assert verdict["wins"] is wins and why in verdict["why"]
    assert verdict["rival"] == "reference" and clock.turns == 1
    assert verdict["us"] == pytest.approx(1e6 * clock.seconds["ours"])


def test_times_that_spread_are_taken_again_and_then_not_believed(only_cpp):
    clock = Clock(0.1, spread=0.3)
    assert judge(REQUEST, CPU, clock)["cpp"]["wins"] is None
    assert clock.turns == 2
    (judged, *_) = tune([REQUEST], CPU, timer=clock)
    assert judged.verdict is None and "spread by" in judged.why
    assert not list(tune([], CPU)), "nothing was written"


def test_on_a_device_the_host_must_not_lose_more():
    device = torch.device("cuda")
    make = lambda host: judge_module._timed(  # noqa: E731
        {"ours": bool, "rival": bool}, device, Clock(0.5, host=host)
    )
    assert make((0.4, 0.0))["why"] == ""
    assert "host loses more" in make((0.6, 0.0))["why"]
    assert make((0.6, 0.3))["why"] == ""


def with_kernel(monkeypatch, function):
    kernel = registry._implementations["cross_entropy"]["cpp"]
    changed = replace(kernel, function=function)
    monkeypatch.setitem(registry._implementations["cross_entropy"], "cpp", changed)


def test_a_wrong_kernel_is_refused_and_the_doctor_says_so(monkeypatch, only_cpp):
    from mts_fast.cli.doctor import report

    right = registry.implementation("cross_entropy", "reference")
    with_kernel(monkeypatch, lambda *a: right(*a) * (1 + 1e-3))
    clock = Clock(0.1)
    (judged, *_) = tune([REQUEST], CPU, timer=clock)
    assert judged.verdict["wins"] is False and "its error 1.0e-03" in judged.verdict["why"]
    assert clock.turns == 0, "it is not even timed"
    table.forget()
    assert "not used: cross_entropy" in report() and "its error 1.0e-03" in report()


def test_a_kernel_that_is_nan_or_of_another_shape_is_refused(monkeypatch, only_cpp):
    right = registry.implementation("cross_entropy", "reference")
    for wrong in (lambda *a: right(*a) * float("nan"), lambda *a: right(*a)[:-1]):
        with_kernel(monkeypatch, wrong)
        assert judge(REQUEST, CPU, Clock(0.1))["cpp"]["wins"] is False


def test_a_kernel_whose_runs_differ_is_refused(monkeypatch, only_cpp):
    right = registry.implementation("cross_entropy", "reference")
    calls = iter(range(100))
    with_kernel(monkeypatch, lambda *a: right(*a) * (1 + 1e-7 * (next(calls) % 2)))
    verdict = judge(REQUEST, CPU, Clock(0.1))["cpp"]
    assert verdict["wins"] is False and verdict["why"] == "two runs differ"


def test_a_kernel_that_raises_has_no_verdict_and_the_rest_goes_on(monkeypatch, only_cpp):
    with_kernel(monkeypatch, lambda *a: 1 / 0)
    other = Request.of("virtual_update", "SGDState", [torch.randn(5), torch.randn(5)])
    judged = list(tune([REQUEST, other], CPU, timer=Clock(0.5)))
    assert judged[0].verdict is None and "ZeroDivisionError" in judged[0].why
    assert {j.request.op for j in judged[1:]} == {"virtual_update"}
    assert all(j.verdict["wins"] for j in judged[1:])


def test_what_was_judged_is_not_timed_again_unless_asked(only_cpp):
    clock = Clock(0.5)
    first = list(tune([REQUEST, REQUEST], CPU, timer=clock))
    turns = clock.turns
    second = list(tune([REQUEST], CPU, timer=clock))
    assert clock.turns == turns and all(j.old for j in second)
    assert [j.verdict for j in second] == [j.verdict for j in first]
    assert not any(j.old for j in tune([REQUEST], CPU, again=True, timer=Clock(2.0)))
    third = list(tune([REQUEST], CPU, timer=clock))
    assert not any(j.verdict["wins"] for j in third)


def test_a_verdict_flips_auto_and_changes_no_result(only_cpp):
    expected = registry.resolve("cross_entropy", [X])
    list(tune([REQUEST], CPU, timer=Clock(0.5)))
    assert registry.resolve("cross_entropy", [X]) is expected, "not in this process"
    table.forget()
    assert registry.resolve("cross_entropy", [X]) is not expected


def shapes_of(op):
    """Tensors of every op that is timed, a few entries each."""
    matrices = [torch.randn(5, 7), torch.randn(3), torch.randn(2, 2)]
    of_products = [torch.randn(4, 3, 6), torch.randn(5, 6), torch.randn(4, 3, 5)]
    return {
        "cross_entropy": [torch.randn(4, 9)],
        "weighted_cross_entropy": [torch.randn(4, 3, 9)],
        "linear_cross_entropy": [torch.randn(4, 6), torch.randn(9, 6)],
        "linear_cross_entropy_tangent": [torch.randn(4, 6), torch.randn(9, 6)],
        "hypergradient_dot": [*of_products, torch.randn(5)],
        "sample_dot": [torch.randn(4, 6), torch.randn(4, 6)],
        "layer_norm_sample_gradients": [torch.randn(4, 3, 6), torch.randn(4, 3, 6)],
        "group_norm_sample_gradients": [torch.randn(4, 6, 3), torch.randn(4, 6, 3)],
        "virtual_update": matrices * 2,
        "hypergradient_direction": matrices * 3,
        "virtual_update_along": matrices * 3,
        "global_norm": matrices,
        "perturb": [*matrices * 2, torch.randn(())],
    }[op]


VARIANTS = {
    "weighted_cross_entropy": ("", "statistics"),
    "layer_norm_sample_gradients": ("centered+bias", ""),
    "group_norm_sample_gradients": ("groups=2",),
    **dict.fromkeys(
        ("virtual_update", "hypergradient_direction", "virtual_update_along"),
        ("SGDState", "AdamState", "AdamState+SGDState"),
    ),
}


@pytest.mark.parametrize("op", _MAKERS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_op_is_judged_with_right_results(op, backward):
    """By Triton's interpreter where there is no GPU: a call of the test's own tensors is judged."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    differentiable = ("cross_entropy", "weighted_cross_entropy", "linear_cross_entropy")
    if backward and op not in differentiable:
        pytest.skip("it has no backward")
    tensors = [t.to(place).requires_grad_(backward) for t in shapes_of(op)]
    for variant in VARIANTS.get(op, ("",)):
        verdicts = judge(Request.of(op, variant, tensors), place, Clock(0.5))
        assert "triton" in verdicts, op
        for backend, verdict in verdicts.items():
            assert verdict["wins"] is True, (backend, verdict)
            assert verdict["error"] < 1e-5


def test_every_op_with_a_triton_kernel_can_be_judged():
    with_kernels = {op for op, names in registry.registered().items() if "triton" in names}
    assert with_kernels == set(_MAKERS)


def test_other_rules_have_nothing_to_time():
    request = Request.of("virtual_update", "RMSpropState", [torch.randn(3), torch.randn(3)])
    assert judge(request, CPU, Clock(0.5)) == {}


@pytest.mark.parametrize("layout", ["transposed", "expanded", "shifted", "half"])
def test_a_case_has_the_recorded_layout_and_the_same_numbers_again(layout):
    x = torch.randn(8, 12)
    x = {
        "transposed": x.t(),
        "expanded": x[:, :1].expand(8, 12),
        "shifted": x.flatten()[3:75].view(8, 9),
        "half": x.bfloat16(),
    }[layout]
    request = Request.of("sample_dot", "", [x, x])
    first, second = (case_of(request, CPU).arguments for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert (a.shape, a.stride(), a.dtype) == (x.shape, x.stride(), x.dtype)
        assert a.storage_offset() * a.element_size() % 16 == (
            x.storage_offset() * x.element_size() % 16
        )
    assert not torch.equal(first[0], first[1])


def test_a_case_leaves_the_generators_alone():
    before = torch.get_rng_state()
    case_of(REQUEST, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_relative_error():
    a = [torch.tensor([3.0, 4.0])]
    assert relative_error(a, a) == 0
    assert relative_error([torch.tensor([3.0, 3.0])], a) == pytest.approx(0.2)
    assert relative_error([torch.zeros(1)], a) == float("inf")


def test_calls_take_turns():
    seen = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    seconds = interleaved(calls, 3)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert {len(s) for s in seconds.values()} == {3}
    assert on_device(calls, 2, CPU).device.keys() == {"a", "b"}


RANKS = """
import os, sys, torch
import torch.distributed as dist
import mts_fast.ops
rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ["MTS_FAST_CACHE_DIR"] = f"{folder}/{rank}"
os.environ["MTS_FAST_VERDICTS"] = "cached"
from mts_fast.backends import registry
from mts_fast.backends.verdicts import table
from mts_fast.backends.verdicts.environment import environment
from mts_fast.backends.verdicts.requests import Request
from mts_fast.tuning.ranks import share_verdicts
cpu, x = torch.device("cpu"), torch.zeros(4, 20)
share_verdicts(cpu)  # without a group it does nothing
if rank == 0:
    here, request = environment(cpu), Request.of("cross_entropy", "", [x])
    table.add(table.path_of(here), here, {table.name_of(request, "cpp"): {"wins": True}})
table.forget()
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
share_verdicts(cpu)
function = registry.resolve("cross_entropy", [x])
assert function is registry.implementation("cross_entropy", "cpp"), function
dist.destroy_process_group()
"""


def test_all_ranks_choose_as_the_first(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


MODEL = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1200), torch.randn(8, 4), torch.randint(1200, (8,))

def alone():
    return torch.nn.Linear(4, 3)

def texts():
    return torch.nn.Linear(4, 3), ["a"], ["b"]
"""


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    (tmp_path / "tuned_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "tuned_model", raising=False)


def test_the_verb_times_a_model_and_a_recording(only_cpp, model_file, tmp_path, capsys, cache):
    """Whatever the clock says: every line names an op and an outcome, and the file is valid."""
    status = main(["tune", "--model", "tuned_model:make", "--device", "cpu"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("verdicts: ") and any("virtual_update AdamState" in x for x in lines)
    assert status == int(any("not judged" in line for line in lines))
    judged = [line for line in lines if "not judged" not in line]
    verdicts = [
        v for path in cache.glob("*.json") for v in json.loads(path.read_text())["verdicts"]
    ]
    assert len(verdicts) == len(judged)
    with record_requests("requests.json"):
        registry.resolve("cross_entropy", [X])
    status = main(["tune", "--from", "requests.json", "--device", "cpu"])
    assert "cross_entropy" in capsys.readouterr().out and status in (0, 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--from or --model must be given, one of them, got neither"),
        (["--from", "a", "--model", "b:c"], "got both"),
        (["--from", "a", "--optimizer", "sgd"], "--optimizer must be given with --model only"),
        (["--from", "nothing.json"], "No such file"),
        (["--from", "tuned_model.py"], "--from must be a file of mts_fast.record_requests"),
        (["--from", "none.json"], "must be with ops that have kernels on cpu"),
        (["--model", "tuned_model:alone"], "must be (module, inputs, labels)"),
        (["--model", "tuned_model:texts"], "must be tensors of at least one sample"),
        (["--model", "tuned_model"], "--model must be PACKAGE.MODULE:FACTORY"),
        (["--model", "nowhere:make"], "must be a model that runs"),
        (
            ["--model", "tuned_model:make", "--device", "meta"],
            "--device must be on a device that holds values",
        ),
    ],
)
def test_the_verb_says_what_is_wrong(words, expected, model_file, capsys):
    with record_requests("none.json"):
        pass
    words = words if "--device" in words else [*words, "--device", "cpu"]
    assert main(["tune", *words]) == 2
    message = capsys.readouterr().err
    assert expected in message, message
    assert message.startswith("mts-fast tune: ")


def test_the_verb_needs_a_file_to_write(model_file, monkeypatch, capsys):
    monkeypatch.setenv("MTS_FAST_VERDICTS", "off")
    assert main(["tune", "--model", "tuned_model:make", "--device", "cpu"]) == 2
    assert "MTS_FAST_VERDICTS must be 'cached' or a path" in capsys.readouterr().err


def test_nothing_is_looked_up_without_a_file(monkeypatch, caplog):
    """The usual case costs nothing: no request is made, the environment is not asked."""
    monkeypatch.setattr(Request, "of", None)
    monkeypatch.setattr(table, "environment", None)
    with caplog.at_level(logging.WARNING, "mts_fast"):
        registry.resolve("cross_entropy", [X])
    assert caplog.text == ""
