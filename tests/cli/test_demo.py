"""The demo: its scenario, its arms, its command line."""

import gzip
import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mts_fast.cli.main import main
from mts_fast.demo.arms import ARMS, run_seed, selection_auc
from mts_fast.demo.classifiers import SETTINGS, accuracy, train_weighted
from mts_fast.demo.images import load_fashion
from mts_fast.demo.run import summarize
from mts_fast.demo.scenario import GOOD, KINDS, REAL, make_scenario

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenario():
    return make_scenario("digits", 3)


def test_scenario_repeats_and_differs_by_seed(scenario):
    again, other = make_scenario("digits", 3), make_scenario("digits", 4)
    assert torch.equal(scenario.pool.images, again.pool.images)
    assert torch.equal(scenario.pool.labels, again.pool.labels)
    assert not torch.equal(scenario.pool.images, other.pool.images)


def test_scenario_holds_what_it_says(scenario):
    counts = {k: int((scenario.kind == i).sum()) for i, k in enumerate(KINDS)}
    assert counts == {k: round(share * 4000) for k, share in KINDS.items()}
    assert int((scenario.kind == REAL).sum()) == len(scenario.val) == 100
    assert scenario.val.labels.bincount().tolist() == [10] * 10
    assert len(scenario.test) == 1797 - 200
    # no test or validation image is among the real training images
    real = {tuple(x.flatten().tolist()) for x in scenario.real.images}
    clean = [*scenario.val.images, *scenario.test.images]
    assert sum(tuple(x.flatten().tolist()) in real for x in clean) == 0


def test_planted_failures_hurt_and_good_samples_help(scenario):
    settings = replace(SETTINGS["digits"], steps=150)

    def train(images):
        return accuracy(train_weighted(images, settings, 0, lambda _: None), scenario.test)

    good = train(scenario.pool[(scenario.kind == GOOD) | (scenario.kind == REAL)])
    assert good > train(scenario.pool) + 0.1


def test_auc_of_the_truth_is_one(scenario):
    truth = (scenario.kind == GOOD).float()
    assert selection_auc(scenario, truth) == 1.0
    assert selection_auc(scenario, 1 - truth) == 0.0


def test_every_arm_is_reported():
    result = run_seed("digits", 0, None, replace(SETTINGS["digits"], steps=5), lambda *_: None)
    rows = summarize([result, result])
    assert tuple(rows) == ARMS
    assert rows["MTS"]["accuracy"] == pytest.approx(100 * result.accuracy["MTS"])
    assert rows["MTS"]["accuracy_spread"] == 0
    assert len(result.weights) == 4100 and len(result.curves["gsnr"]) == 5


def test_missing_fashion_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be a folder with Fashion-MNIST"):
        load_fashion(str(tmp_path))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder of small sets in place of Fashion-MNIST; its pixel values count up."""
    for part, count in (("train", 210), ("t10k", 20)):
        images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx(np.arange(count, dtype=np.uint8) % 10))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_fashion_files_plain_and_compressed(fashion):
    train, test = load_fashion(str(fashion))
    assert train.images.shape == (210, 1, 14, 14) and len(test) == 20
    assert torch.equal(train.labels, torch.arange(210) % 10)
    first = torch.tensor([0, 1, 28, 29]).double().mean() / 255
    assert train.images[0, 0, 0, 0].item() == pytest.approx(first.item())


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (IMAGES, lambda data: data[:-1], "of 164656 bytes, for shape [210, 28, 28], got 164655"),
        (IMAGES, lambda data: data + b"x", "of 164656 bytes, for shape [210, 28, 28], got 164657"),
        (IMAGES, lambda data: data[:9], "a complete IDX file, got 9 bytes"),
        (IMAGES, lambda data: b"", "an IDX file of unsigned bytes, got other content"),
        (IMAGES, lambda _: idx(np.zeros((210, 8, 8), "u1")), "of images of 28 x 28, got shape"),
        (LABELS, lambda _: b"not compressed", "a complete gzip file, got Not a gzipped file"),
        (LABELS, lambda data: data[:-9], "a complete gzip file, got Compressed file ended before"),
        (LABELS, lambda data: data[:20] + b"xxxx" + data[24:], "a complete gzip file, got "),
        (LABELS, lambda _: gzip.compress(idx(np.zeros(9, "u1"))), "of a label for each of the 210"),
        (
            LABELS,
            lambda _: gzip.compress(idx(np.arange(210, dtype="u1") % 11)),
            "of classes 0 to 9, 21 images of each or more, got counts [20, 19, 19,",
        ),
    ],
)
def test_damaged_fashion_files_are_named(name, change, said, fashion):
    file = fashion / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"; fetch it once more$") as caught:
        load_fashion(str(fashion))
    message = str(caught.value).replace(".gz'", "'")
    assert message.startswith(f"demo: file {str(file).removesuffix('.gz')!r} must be {said}")


def test_doctor_names_every_backend(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("triton", "cpp", "reference", "label_agreement", "finite_difference"):
        assert word in printed


def test_readme_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables" / "documents.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    assert "timm         missing: pip install timm (" in said
