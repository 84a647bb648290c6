"""The GPU benchmark of whole steps: which call is counted, and the table of its record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_step import GRAPH, cost_of, counted_call, roof_cells
from roofline import step_cost
from step_arms import Ours, Plain
from step_models import labelled, task_of
from torch import nn

TABLES = Path(__file__).parents[2] / "benchmarks" / "tables"
ROOFLINE = ["GB", "GB/s", "TFLOP", "TFLOP/s", "roof ms", "% of roof", "% of roof by bytes"]


@pytest.fixture
def task():
    """Six samples for a small multi-layer perceptron, on the CPU."""

    def build():
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    return task_of(build, labelled((5,), 3), 6, "cpu", 3)


@pytest.mark.parametrize("calls_before", [1, 2, 3, 5])
def test_a_call_that_checks_the_engine_is_not_counted(task, calls_before):
    arm = Ours(task)
    for _ in range(16):  # the 16th checks, the 17th does not
        arm.step()
    unchecked = step_cost(arm.step)
    arm = Ours(task)
    checked = step_cost(arm.step)
    for _ in range(calls_before - 1):
        arm.step()
    assert cost_of(arm.step) == unchecked
    assert checked.bytes > unchecked.bytes


def test_a_graph_is_counted_as_the_step_that_it_replays(task):
    def replay():
        raise AssertionError("a replay dispatches nothing to be counted")

    plain = Plain(task)
    assert counted_call("plain", plain.step, "float32", task) == plain.step
    adamw = Ours(task, "adamw")
    for label, arm in (
        (f"auto, exact, {GRAPH}", Ours(task)),
        (f"auto, exact, AdamW, {GRAPH}", adamw),
    ):
        counted = cost_of(counted_call(label, replay, "float32", task))
        assert counted == cost_of(arm.step)
        assert counted.flops > 0


def test_a_step_out_of_memory_has_no_cells():
    def call():
        raise torch.OutOfMemoryError

    assert roof_cells(call, 1.0, "float32") == {}


def test_table(tmp_path, task):
    """Counts of a plain step, an empty row for an arm that ran out of memory, and the ceilings."""
    cells = roof_cells(Plain(task).step, 2.0, "float32")
    cost = step_cost(Plain(task).step)
    assert cells["TFLOP"] == pytest.approx(cost.flops / 1e12, rel=1e-3)
    rows = {
        "plain": {"ms": 2000.0, "time": 1.0, "peak_mib": 1, "gap": None, "precision": "float32"},
        "published": {"time": "out of memory"},
    }
    rows["plain"] |= cells
    run = {"model": "mlp", "batch": 6, "precision": "float32", "rows": rows}
    record = {"command": "make gpu-step", "machine": "a machine", "rows": [run]}
    (tmp_path / "step.json").write_text(json.dumps(record))
    command = [sys.executable, str(TABLES / "gpu.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    lines = (tmp_path / "table.md").read_text().splitlines()
    head = next(line for line in lines if "| model |" in line).split(" | ")
    place = head.index(ROOFLINE[0])
    assert head[place : place + len(ROOFLINE)] == ROOFLINE
    plain, published = (
        next(line for line in lines if f"| {label} |" in line).split(" | ")
        for label in ("plain", "published")
    )
    assert plain[place : place + len(ROOFLINE)] == [str(cells[name]) for name in ROOFLINE]
    assert published[place : place + len(ROOFLINE)] == [""] * len(ROOFLINE)
    rate = cells["product TFLOP/s"]["float32"]
    about = next(line for line in lines if "Ceilings" in line)
    copied = f"copy GB/s: {cells['copy GB/s']}"
    assert f"Ceilings: {copied}; float32 product TFLOP/s in float32: {rate}." in about
