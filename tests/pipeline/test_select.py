"""Samples that a finished run recommends, as files that other tools read."""

import csv
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from small_runs import table_of, train

from mts_fast.cli.main import main
from mts_fast.pipeline.config import load_config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.select import choose
from mts_fast.pipeline.sources import read_sources

TEXTS = {"good": "fine lovely", "bad": "dull cold"}


def selected(folder):
    with open(folder / "selected.csv", newline="") as file:
        return list(csv.DictReader(file))


def synthetic(rows):
    return [row for row in rows if row["role"] == "synthetic"]


def test_the_better_half(finished, tmp_path, capsys):
    words = ["select", str(finished / "run"), "--keep", "0.5", "--out", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "16" in out and "8" in out and "selected.csv" in out
    rows, table = selected(tmp_path), table_of(finished)
    assert len(rows) == 12 + 8 and all((finished / row["file"]).is_file() for row in rows)
    best = sorted((float(row["weight"]) for row in synthetic(table)), reverse=True)[:8]
    assert sorted((float(row["weight"]) for row in synthetic(rows)), reverse=True) == best
    sampler = load_file(tmp_path / "sampler.safetensors")
    weights = [float(r["weight"]) if r["role"] == "synthetic" else 1.0 for r in rows]
    assert sampler["weights"].tolist() == pytest.approx(weights, rel=1e-6)
    assert sampler["is_synthetic"].tolist() == [row["role"] == "synthetic" for row in rows]


def test_by_class_and_by_threshold(finished):
    outcome = load_outcome("select", finished / "run")
    labels = [row.label for row in outcome.rows]
    chosen = choose(outcome, keep=0.25, per_class=True, with_real=False).chosen
    assert Counter(labels[i] for i in chosen.nonzero().flatten()) == {"red": 2, "blue": 2}
    weights = torch.tensor([row.weight for row in outcome.rows], dtype=torch.float64)
    middle = float(weights[12:].sort().values[9])
    chosen = choose(outcome, threshold=middle, with_real=False)
    assert chosen.chosen[12:].tolist() == (weights[12:] >= middle).tolist()
    assert chosen.selected.total() == 7 and not chosen.chosen[:12].any()
    # a share that rounds to nothing leaves one
    assert choose(outcome, keep=0.001, with_real=False).chosen.sum() == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--keep or --threshold must be given, one of them, got neither"),
        (("--keep", "0.5", "--threshold", "0"), "got both"),
        (("--keep", "0"), "--keep must be a share above 0 and up to 1, got 0.0"),
        (("--keep", "1.5"), "got 1.5"),
        (("--threshold", "9"), "must be reached by some sample, got 9.0; the highest weight is 0."),
        (("--threshold", "0.1", "--per-class"), "--per-class must be used with --keep"),
    ],
)
def test_refusals(finished, tmp_path, capsys, words, said):
    assert main(["select", str(finished / "run"), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_that_are_no_finished_run(tree, capsys):
    assert main(["select", str(tree), "--keep", "0.5"]) == 2
    assert "must be the folder of a finished run" in capsys.readouterr().err
    assert train(tree, epochs=2) == 0
    outcome = tree / "run" / "outcome.json"
    content = outcome.read_text()
    outcome.unlink()
    assert main(["select", str(tree / "run"), "--keep", "0.5"]) == 2
    assert "has not finished; give the command of the run again" in capsys.readouterr().err
    outcome.write_text(content)
    table = tree / "run" / "weights.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-3]))
    assert main(["select", str(tree / "run"), "--keep", "0.5"]) == 2
    assert "weights.csv is not as it was written" in capsys.readouterr().err
    outcome.write_text(json.dumps({**json.loads(content), "version": 99}))
    assert main(["select", str(tree / "run"), "--keep", "0.5"]) == 2
    assert "of another version" in capsys.readouterr().err


def test_a_selection_is_a_list_to_train_on(finished, tmp_path):
    assert main(["select", str(finished / "run"), "--keep", "0.5", "--out", str(tmp_path)]) == 0
    options = {"real": str(finished / "data" / "real"), "model": "m:f"}
    options["synthetic"] = [str(tmp_path / "selected.csv")]
    findings = Findings()
    samples = read_sources(load_config(None, options, ()), findings)
    assert not findings.errors and len(samples["synthetic"]) == 8
    assert "12 rows of role real are left out" in findings.remarks[0]


def test_other_tools_read_it(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    assert main(["select", str(finished / "run"), "--keep", "0.5", "--out", str(tmp_path)]) == 0
    path = str(tmp_path / "selected.parquet")
    data = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    data = data.cast_column("file", datasets.Image())
    assert data[0]["file"].size == (8, 8)
    assert data["weight"] == [float(row["weight"]) for row in selected(tmp_path)]
