"""Mistakes of a first hour with the command line: what is said of them, and what they cost."""

import csv
import json
import os
import shutil
import sys

import pytest
from small_runs import train
from small_trees import install_small_model

from mts_fast.cli.main import main
from mts_fast.pipeline.config import load_config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.data.lists import read_list
from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.select import choose, write_selection


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "got 'trian'; did you mean 'train'? Or see `mts-fast --help`\n"),
        (["train", "--epochs", "3"], "got --epochs; pass --set epochs=VALUE, or see"),
        (["train", "--batch-size", "3"], "got --batch-size; pass --set batch_size=VALUE, or see"),
        (["train", "--set", "epochs", "3"], "got '3'; write --set KEY=VALUE as one word\n"),
        (["train", "--model", "m:f", "--real", "r"], "got 1 mistake:\n- 'synthetic' is not given"),
        (["select", "RUN", "--keep", "50"], "got 50.0; write 50 % as 0.5\n"),
        (["select", "RUN", "--keep", "half"], "--keep must be a number, got 'half'; pass one"),
        (["select", "RUN", "--keep", "1", "--out", ""], "--out must be a folder, got ''; name"),
        (["report", "RUN", "--out", ""], "--out must be a file, got ''; name one"),
        (["report", "RUN", "--out", "RUN"], "--out must be a file, or new, got the folder"),
        (["report", "RUN/weights.csv"], "without one; pass 'RUN'"),
        (["report", "BESIDE"], "without one; finished runs are 'RUN'"),
        (["report", "BESIDE/rum"], "without one; finished runs are 'RUN'"),
        (["recipe", "nope"], "got 'nope'; `mts-fast recipe` lists them"),
        (["recipe", "waterbird"], "did you mean 'waterbirds'?"),
    ],
)
def test_what_is_said(words, said, finished, capsys):
    run = str(finished / "run")
    places = {"RUN": run, "BESIDE": str(finished)}
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    assert main(words) == 2
    assert said.replace("RUN", run) in capsys.readouterr().err


def test_fifty_per_cent(finished, tmp_path):
    words = ["select", str(finished / "run"), "--keep", "50%", "--no-real", "--out", str(tmp_path)]
    assert main(words) == 0
    assert len((tmp_path / "selected.csv").read_text().splitlines()) == 1 + 8


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("small_models.small_model", "did you mean 'small_models:small_model'?"),
        ("small_models.py:small_model", "write it as 'small_models:small_model'"),
        ("./in/small_models:small_model", "write it as 'small_models:small_model'"),
        ("small_models:smal_model", "did you mean 'small_model'?"),
        ("none_models:f", "modules are looked for where the command is called"),
        ("rn50", "pip install 'mts_fast[models]' where it is one of timm or torchvision, not"),
    ],
)
def test_models_are_refused_before_data_are_read(model, said, tree, monkeypatch, capsys):
    find = lambda name: None if name in ("timm", "torchvision") else name  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", find)
    assert train(tree, "--model", model) == 2
    err = capsys.readouterr().err
    assert said in err and not (tree / "run").exists()


def test_output_in_a_new_folder(finished, tmp_path, monkeypatch, capsys):
    install_small_model(monkeypatch)
    run, page, table = str(finished / "run"), tmp_path / "a/b/r.html", tmp_path / "c/d/s.csv"
    assert main(["report", run, "--out", str(page)]) == 0 and page.is_file()
    new = ["--synthetic", str(finished / "data" / "test")]
    assert main(["score", run, *new, "--out", str(table)]) == 0 and table.is_file()
    # refused before the work, and folders that were made for it go again
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "r.html")
    monkeypatch.setattr("mts_fast.cli.report.write_report", None)
    assert main(["report", run, "--out", place]) == 2
    assert "report: --out must be a folder, or new, got" in capsys.readouterr().err
    new = ["--synthetic", str(finished / "data"), "--out", str(tmp_path / "e" / "s.csv")]
    assert main(["score", run, *new]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mts-fast score: the data must be free of errors")
    assert "nothing was written" in err and not (tmp_path / "e").exists()


def test_a_run_where_its_model_is_not(finished, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "small_models", raising=False)
    monkeypatch.setattr("mts_fast.pipeline.score.read_role", None)
    assert main(["score", str(finished / "run"), "--synthetic", "never-read"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mts-fast score: --model must be importable") and "PYTHONPATH" in err


def test_the_options_of_a_run_are_a_configuration(finished, tmp_path, monkeypatch, capsys):
    file = finished / "run" / "config.json"
    config = load_config(str(file), {"seed": 7}, ())
    assert config.model_dump() == {**json.loads(file.read_text()), "seed": 7} | {
        name: getattr(config, name) for name in ("synthetic", "decay_epochs", "loggers")
    }
    for text, said in (("[1]", "with a list"), ("{", "config.json' (Expecting")):
        (tmp_path / "config.json").write_text(text)
        assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
        err = capsys.readouterr().err
        assert "must be a TOML file, or the config.json of a run" in err and said in err
    install_small_model(monkeypatch)
    again = ["train", "--config", str(file), "--out", str(tmp_path / "again")]
    assert main([*again, "--set", "epochs=1"]) == 0


def test_spaces_around_names_of_files(finished, tmp_path):
    picture = finished / "data" / "real" / "red" / "0.png"
    for name in (" a.png", "a.png ", "b.png"):
        shutil.copy(picture, tmp_path / name)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = [[" a.png", "red"], ["a.png ", "red"], [" b.png ", " red"]]
        csv.writer(file).writerows([["file", "label"], *rows])
    findings = Findings()
    samples = read_list("real", tmp_path / "list.csv", None, findings)
    assert samples.names == (" a.png", "a.png ", "b.png") and not findings.errors


def test_a_selection_of_names_that_are_no_utf8(tree, tmp_path):
    folder = os.fsencode(tree / "data" / "synthetic" / "red")
    os.rename(folder + b"/0.png", folder + b"/caf\xe9.png")
    assert train(tree, epochs=2) == 0
    assert main(["select", str(tree / "run"), "--keep", "1", "--no-real"]) == 0
    findings = Findings()
    path = tree / "run" / "selected" / "selected.csv"
    samples = read_list("synthetic", path, None, findings)
    assert not findings.errors and len(samples) == len(table_of_bytes(tree)) - 12
    path.write_bytes(path.read_bytes().replace(b",red,", b",r\xe9d,"))
    findings = Findings()
    assert read_list("synthetic", path, None, findings) is None
    assert "is not UTF-8 in line 10" in findings.errors[0]


def table_of_bytes(tree):
    """Lines of the table of weights, without its head."""
    return (tree / "run" / "weights.csv").read_bytes().splitlines()[1:]


def test_a_selection_of_texts_has_the_column_of_the_run(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    record = json.loads((run / "outcome.json").read_text())
    (run / "stages" / "texts.json").write_text(json.dumps([f"text {i}" for i in range(60)]))
    for name, column in (("review", "review"), ("source", "text")):
        config = {**record["config"], "text_column": name}
        changed = {**record, "store": "stages/texts.json", "config": config}
        (run / "outcome.json").write_text(json.dumps(changed))
        outcome = load_outcome("select", run)
        write_selection(outcome, choose(outcome, keep=0.5), tmp_path / "out")
        with (tmp_path / "out" / "selected.csv").open(newline="") as file:
            assert next(csv.reader(file))[-1] == column
    findings = Findings()
    (tmp_path / "list.csv").write_text("review,label\nfine,good\n")
    assert read_list("real", tmp_path / "list.csv", None, findings) is None
    assert "or pass --text-column where they are texts" in findings.errors[0]
