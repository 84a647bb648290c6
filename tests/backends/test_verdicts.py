"""Verdicts of this machine: they steer `auto` and nothing else; files that are damaged, foreign or
written by several processes at once are never wrong."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import mts_fast
from mts_fast import use_backend
from mts_fast.backends import registry
from mts_fast.backends.verdicts import table
from mts_fast.backends.verdicts.environment import environment
from mts_fast.backends.verdicts.requests import Request, read_requests, record_requests
from mts_fast.ops import cross_entropy

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 3, 2, 1])


def request_of(op, *tensors, variant=""):
    return Request.of(op, variant, tensors)


def served(*tensors, op="cross_entropy"):
    """The backend whose function `resolve` returns."""
    function = registry.resolve(op, tensors)
    return next(n for n, i in registry._implementations[op].items() if i.function is function)


def judge(request, backend, wins):
    verdict = {"wins": wins, "us": 1.0, "rival": "reference", "rival_us": 2.0}
    here = environment(CPU)
    return table.add(table.path_of(here), here, {table.name_of(request, backend): verdict})


def test_keys_stay():
    """A change of these orphans every user's verdicts."""
    x = torch.zeros(300, 50_257, dtype=torch.bfloat16)
    assert request_of("cross_entropy", x).key == (
        "cross_entropy |  | forward | ieee | bfloat16[2^9, 2^16%1] rows"
    )
    y = torch.zeros(8, 64, 100)
    assert request_of("sample_dot", y.transpose(1, 2), y[:, :, 1:].transpose(1, 2)).key == (
        "sample_dot |  | forward | ieee | float32[2^3, 2^7%4, 2^6%16] axes 021; "
        "float32[2^3, 2^7%1, 2^6%16] axes 021 with gaps shifted"
    )
    many = [torch.zeros(10, 10) for _ in range(6)]
    assert request_of("virtual_update", *many, variant="AdamState").key == (
        "virtual_update | AdamState | forward | ieee | 2^3 tensors of 2^12 bytes; float32; rows"
    )


def test_a_key_has_what_another_kernel_is_taken_for():
    x = torch.zeros(4, 6, requires_grad=True)
    plain = request_of("cross_entropy", x.detach()).key
    assert request_of("cross_entropy", x).key != plain
    with torch.no_grad():
        assert request_of("cross_entropy", x).key == plain
    with torch.autocast("cpu", torch.bfloat16):
        assert request_of("cross_entropy", x.detach()).key != plain
    assert request_of("cross_entropy", x.detach(), variant="statistics").key != plain
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert request_of("cross_entropy", x.detach()).key != plain
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize("wins", [True, False])
def test_a_verdict_replaces_ours_for_auto(wins):
    """In both directions: C++ is ours from 1000 classes on."""
    x = torch.randn(4, 2000 if not wins else 20)
    default = "reference" if wins else "cpp"
    assert served(x) == default
    judge(request_of("cross_entropy", x), "cpp", wins)
    table.forget()
    assert served(x) == ("cpp" if wins else "reference")
    assert served(torch.randn(4, 500)) == "reference", "another size keeps ours"
    with use_backend("reference"):
        assert served(x) == "reference"
    with use_backend("cpp"):
        assert served(x) == "cpp"
    with table.ignored():
        assert served(x) == default


def test_results_are_those_of_the_op():
    x = torch.randn(4, 20)
    expected = cross_entropy(x, LABELS)
    judge(request_of("cross_entropy", x), "cpp", True)
    table.forget()
    torch.testing.assert_close(cross_entropy(x, LABELS), expected)


def test_a_process_does_not_change_its_mind():
    x = torch.randn(4, 20)
    assert served(x) == "reference"
    judge(request_of("cross_entropy", x), "cpp", True)
    assert served(x) == "reference"


def test_a_verdict_cannot_make_a_kernel_run_where_it_cannot():
    x = torch.randn(4, 20, dtype=torch.float64)  # C++ takes float32
    judge(request_of("cross_entropy", x), "cpp", True)
    table.forget()
    assert served(x) == "reference"


@pytest.mark.parametrize("value", ["off", "cached", "a file"])
def test_the_variable_picks_the_file(value, tmp_path, monkeypatch, cache):
    x = torch.randn(4, 20)
    judge(request_of("cross_entropy", x), "cpp", True)
    (written,) = cache.glob("*.json")
    if value == "a file":
        written = written.rename(tmp_path / "pinned.json")
        monkeypatch.setenv("MTS_FAST_VERDICTS", str(written))
    else:
        monkeypatch.setenv("MTS_FAST_VERDICTS", value)
    table.forget()
    assert served(x) == ("reference" if value == "off" else "cpp")


def test_a_file_for_the_other_kind_of_device_is_no_news(tmp_path, monkeypatch, caplog):
    """One file is named for a process that uses a GPU, and a CPU beside it."""
    path = tmp_path / "gpu.json"
    here = environment(CPU) | {"type": "cuda"}
    path.write_text(json.dumps({"schema": 1, "environment": here, "verdicts": {}}))
    monkeypatch.setenv("MTS_FAST_VERDICTS", str(path))
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert served(torch.randn(4, 20)) == "reference"
    assert caplog.text == ""


def test_a_named_file_that_is_missing_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MTS_FAST_VERDICTS", str(tmp_path / "nothing.json"))
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert served(torch.randn(4, 20)) == "reference"
    assert len(caplog.records) == 1 and "there is no such file" in caplog.text


def spoiled(content):
    """Forms of a file that must not be believed, by what is wrong with them."""
    here, verdicts = content["environment"], content["verdicts"]
    return {
        "cut off": json.dumps(content)[:-40],
        "empty": "",
        "a list": "[]",
        "text": "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
        "another schema": json.dumps(content | {"schema": 99}),
        "another machine": json.dumps(content | {"environment": here | {"device": "abacus"}}),
        "other kernels": json.dumps(content | {"environment": here | {"kernels": "0"}}),
        "verdicts a list": json.dumps(content | {"verdicts": [1]}),
        "wins a number": json.dumps(content | {"verdicts": {n: {"wins": 1} for n in verdicts}}),
        "no wins": json.dumps(content | {"verdicts": {n: {} for n in verdicts}}),
    }


@pytest.mark.parametrize("what", spoiled({"environment": {}, "verdicts": {}}))
def test_a_damaged_or_foreign_file_is_ignored_with_one_line(what, cache, caplog):
    x = torch.randn(4, 20)
    request = request_of("cross_entropy", x)
    judge(request, "cpp", True)
    (path,) = cache.glob("*.json")
    text = spoiled(json.loads(path.read_text()))[what]
    path.write_text(text)
    table.forget()
    with caplog.at_level(logging.WARNING, "mts_fast"):
        assert served(x) == "reference"
        served(x)
    assert [r.getMessage().count("\n") for r in caplog.records] == [0]
    assert "ignored" in caplog.text
    if what in ("another schema", "another machine", "other kernels"):
        # sound, and perhaps committed beside someone's code: it is left alone
        with pytest.raises(ValueError, match=r"must be of this environment, got .*; name another"):
            judge(request, "cpp", False)
        assert path.read_text() == text
        return
    # it is put aside, not lost, when there is something to write
    assert len(judge(request, "cpp", False)) == 1
    assert path.with_suffix(".damaged").read_text() == text
    assert not json.loads(path.read_text())["verdicts"][table.name_of(request, "cpp")]["wins"]


def test_a_file_of_the_other_kind_of_device_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    here = environment(CPU) | {"type": "cuda"}
    path.write_text(text := json.dumps({"schema": 1, "environment": here, "verdicts": {}}))
    monkeypatch.setenv("MTS_FAST_VERDICTS", str(path))
    with pytest.raises(ValueError, match="must be for cpu, got one for cuda; name another file"):
        judge(request_of("cross_entropy", torch.randn(4, 20)), "cpp", True)
    assert path.read_text() == text


def test_verdicts_that_are_there_stay():
    request = request_of("cross_entropy", torch.randn(4, 20))
    judge(request, "cpp", True)
    name = table.name_of(request, "cpp")
    assert judge(request, "cpp", False)[name]["wins"] is True
    here = environment(CPU)
    again = table.add(table.path_of(here), here, {name: {"wins": False}}, again=True)
    assert again[name]["wins"] is False


WRITER = """
import sys, torch
from mts_fast.backends.verdicts import table
from mts_fast.backends.verdicts.environment import environment
here = environment(torch.device("cpu"))
for i in range(40):
    table.add(table.path_of(here), here, {f"{sys.argv[1]} {i}": {"wins": True}})
"""


def test_processes_that_write_at_once_lose_nothing(cache):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(i)]) for i in range(3)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    (path,) = cache.glob("*.json")
    verdicts = json.loads(path.read_text())["verdicts"]
    assert set(verdicts) == {f"{w} {i}" for w in range(3) for i in range(40)}


def test_requests_are_recorded_exactly(tmp_path):
    path = tmp_path / "requests.json"
    x = torch.randn(4, 3, 20)[:, 1:].requires_grad_()
    p = torch.rand(4)
    with record_requests(path):
        for _ in range(2):
            mts_fast.weighted_cross_entropy(x, LABELS[:, None].repeat(1, 2), p, statistics=True)
    request, unfused = read_requests("tune", "--from", path)
    assert unfused.op == "cross_entropy"
    assert request == Request.of("weighted_cross_entropy", "statistics", [x])
    assert request.tensors[0].stride == (60, 20, 1) and request.backward
    assert asdict(request)["op"] == "weighted_cross_entropy"


def test_a_recording_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "requests.json"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), record_requests(path):
        raise ZeroDivisionError
    assert path.read_text() == "before"
    with record_requests(path):
        expected = r"record_requests: block must be the only one, .*; end the outer one first"
        with pytest.raises(RuntimeError, match=expected), record_requests(path):
            pass
    assert read_requests("tune", "--from", path) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"schema": 2, "requests": []}', '{"schema": 1, "requests": [{}]}'),
        '{"schema": 1, "requests": [{"op": 1, "variant": "", "backward": false, "precision": "",'
        ' "device": "cpu", "tensors": []}]}',
        '{"schema": 1, "requests": [{"op": "a", "variant": "", "backward": false, "precision": "",'
        ' "device": "cpu", "tensors": [[[2], [1], 0, "bfloat17"]]}]}',
        '{"schema": 1, "requests": [{"op": "a", "variant": "", "backward": false, "precision": "",'
        ' "device": "cpu", "tensors": [[[2], [-1], 0, "float32"]]}]}',
    ],
)
def test_a_file_that_holds_no_requests_is_refused(text, tmp_path):
    path = tmp_path / "requests.json"
    path.write_text(text)
    expected = r"tune: --from must be a file of mts_fast.record_requests, got .*; record it anew"
    with pytest.raises(ValueError, match=expected):
        read_requests("tune", "--from", path)


def test_a_resume_under_other_verdicts_is_told(caplog):
    from small_steps import plain_model, step_of

    state = step_of(plain_model()).state_dict()
    assert state["verdicts"] == []
    judge(request_of("cross_entropy", torch.randn(4, 20)), "cpp", True)
    table.forget()
    step = step_of(plain_model())
    with caplog.at_level(logging.WARNING, "mts_fast"):
        step.load_state_dict(state)
    assert "saved under verdicts none, this process has" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mts_fast"):
        step.load_state_dict(step.state_dict())
    assert caplog.text == ""
    with pytest.raises(TypeError, match=r"state\['verdicts'\] must be as saved"):
        step.load_state_dict(step.state_dict() | {"verdicts": {"cpu": 1}})
