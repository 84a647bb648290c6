"""Memory predicted from one small batch, and what is said where it is not enough."""

import pytest
import torch
from small_runs import train
from small_trees import small_model
from torch import nn

from mts_fast.cli.main import main
from mts_fast.pipeline import memory
from mts_fast.pipeline.memory import available_memory, graph_bytes


def test_bytes_of_a_graph():
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    x = torch.randn(2, 100)
    # the first layer keeps its input, the ReLU its output, which is also the last layer's input
    assert graph_bytes(model, x) == 4 * 2 * (100 + 50)
    model = small_model(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, large = (graph_bytes(model, torch.randn(n, 3, 8, 8)) for n in (2, 64))
    assert large == pytest.approx(32 * small, rel=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_that_will_not_fit(tree, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 60_000)
    assert train(tree) == 2
    err = capsys.readouterr().err
    assert "memory must be enough for 8 samples at a time (about 0 MiB), got 0 MiB free" in err
    size = int(err.split("micro_batch=")[1].split()[0])
    assert 1 <= size < 8 and not list((tree / "run").rglob("done.safetensors"))
    assert train(tree, "--set", f"micro_batch={size}", epochs=2) == 0


def test_what_the_system_says(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    monkeypatch.setattr(memory, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_memory() == 2048 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_memory() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == 2048 * 1024
    (tmp_path / "meminfo").unlink()
    assert available_memory() is None


def test_a_failed_allocation_names_the_micro_batch(tree, capsys, monkeypatch):
    def allocate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("mts_fast.pipeline.run.fit", allocate)
    assert train(tree) == 2
    err = capsys.readouterr().err
    assert "memory must be enough, got CUDA out of memory" in err
    assert "pass --set micro_batch=N with fewer samples than a batch" in err
    assert main(["select", str(tree / "run"), "--keep", "1"]) == 2
