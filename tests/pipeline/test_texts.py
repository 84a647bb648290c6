"""Texts: tokens, cutting, and a whole run on a small transformer from a config."""

import csv
import json

import pytest
import torch
from small_bert import write_bert

from mts_fast.cli.main import main
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.tokens import tokenize

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a BERT of one layer, its vocabulary of letters, and no weights."""
    return write_bert(tmp_path_factory.mktemp("bert"))


def test_long_texts_are_cut_with_one_remark(model):
    findings = Findings()
    texts = tokenize(str(model), ["ab", "ab " * 500, "word " * 300, "a\0b", "\u05e9"], 99, findings)
    assert texts.ids.shape == texts.mask.shape == (5, 32)
    assert texts.mask.sum(1).tolist()[:3] == [4, 32, 32]
    (remark,) = findings.remarks
    assert remark == "2 of 5 texts are longer than 32 tokens and were cut"


def test_a_batch_is_as_long_as_its_longest(model):
    texts = tokenize(str(model), ["ab", "abcd", "abcdefgh"], 99, Findings())
    batch = texts.batch(torch.tensor([1, 0]), torch.device("cpu"))
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].sum(1).tolist() == [6, 4]


def test_a_model_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="--model must be a model with a tokenizer"):
        tokenize(str(tmp_path), ["a"], 9, Findings())


def test_a_run_on_texts(model, tmp_path, capsys):
    words = {"good": "fine lovely warm", "bad": "dull cold broken"}
    paths = {}
    for role, count in (("real", 6), ("synthetic", 6), ("val", 4), ("test", 4)):
        paths[role] = tmp_path / f"{role}.csv"
        with paths[role].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for label, text in words.items():
                for i in range(count):
                    writer.writerow([f'{text}, "{i}"\n{role}', label])
    command = ["train", "--out", str(tmp_path / "run"), "--model", str(model)]
    for role, path in paths.items():
        command += [f"--{role}", str(path)]
    for option in ("epochs=2", "dynamics_epochs=1", "batch_size=8", "refinements=0"):
        command += ["--set", option]
    assert main([*command, "--text-column", "text"]) == 0
    capsys.readouterr()
    with (tmp_path / "run" / "weights.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and rows[0]["file"] == "real.csv:1" and rows[0]["class"] == "good"
    assert main(command) == 2
    assert "has no column file or path" in capsys.readouterr().err
