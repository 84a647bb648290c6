"""`mts-fast doctor`: backends, packages, and a model of the user."""

import importlib.metadata
import sys

from mts_fast.cli.main import main


def test_doctor_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("triton", "cpp", "reference", "label_agreement", "finite_difference"):
        assert word in printed


MODELS = """
import torch
from torch import nn

def alone():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

def with_batch():
    return nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])

def number():
    return 3

def broken():
    return {}["key"]

def leaves():
    raise SystemExit(3)
"""


def test_doctor_explains_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_models_of_this_test.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = "my_models_of_this_test:"
    assert main(["doctor", "--model", f"{spec}alone"]) == 0
    said = capsys.readouterr().out
    assert "1: BatchNorm1d in train mode mixes the samples" in said
    assert "engine='auto' takes forward_mode" in said
    assert main(["doctor", "--model", f"{spec}with_batch"]) == 0
    said = capsys.readouterr().out
    assert "engine='auto' takes ghost" in said and said.endswith("ok\n") and "NOT ok" not in said
    for wrong, message in {
        f"{spec}number": "what number() returns must be a module, or (module, inputs, labels)",
        f"{spec}missing": "--model must be a function of my_models_of_this_test, got 'missing'",
        "my_models_of_this_test": "--model must be PACKAGE.MODULE:FACTORY",
        ".relative:f": "--model must be PACKAGE.MODULE:FACTORY",
        "no_such_module:f": "; run this in the folder that holds it, or install it",
        f"{spec}broken": "must be a model that runs, got KeyError: 'key' (",
        f"{spec}leaves": (
            "must be a model that runs, got SystemExit: 3"
            f" ({tmp_path}/my_models_of_this_test.py:18);"
        ),
    }.items():
        assert main(["doctor", "--model", wrong]) == 2
        assert message in capsys.readouterr().err
    assert str(tmp_path) not in sys.path


def test_doctor_tells_what_would_stop_every_op(monkeypatch, capsys):
    def failing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("MTS_FAST_BACKEND", "fast")
    monkeypatch.setattr("importlib.metadata.version", failing)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "backend in force: none: mts_fast: environment variable MTS_FAST_BACKEND must be" in said
    assert "safetensors  of unknown version (FeatureTable" in said
    assert "timm         missing: pip install 'mts_fast[models]' (" in said
