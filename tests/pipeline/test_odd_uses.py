"""Odd uses of `mts-fast train`: told or refused, never silently another result."""

import sys

import pytest
from safetensors.torch import load_file
from small_runs import records_of, table_of, train

from mts_fast.cli.main import main
from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.sources import _prefixes

NET = """from torch import nn


def net(num_classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    {}
    return model
"""


def test_another_model_under_the_same_name_trains_again(tree, monkeypatch):
    monkeypatch.syspath_prepend(str(tree))
    weights = []
    for line in ("", "model[1].weight.data *= 3"):
        (tree / "net_of_test.py").write_text(NET.format(line))
        sys.modules.pop("net_of_test", None)
        assert train(tree, "--model", "net_of_test:net", epochs=2) == 0
        weights.append(load_file(tree / "run" / "model.safetensors")["1.weight"])
    assert not weights[0].equal(weights[1])
    sys.modules.pop("net_of_test")


def test_records_and_config_are_of_the_run(tree, tmp_path):
    assert train(tree, epochs=5) == 0
    first = (tree / "run" / "config.json").read_text()
    assert train(tree, "--set", "lr=0.01", epochs=3) == 0 and train(tree, epochs=5) == 0
    assert (tree / "run" / "config.json").read_text() == first
    folders = load_outcome("test", tree / "run").stages
    of_run = [r for r in records_of(tree) if r.get("folder") == folders["everything alike"]]
    assert [r["epoch"] for r in of_run] == [1, 2, 3, 4, 5]
    losses = [r["loss"] for r in records_of(tree) if r["stage"] == "everything alike"]
    assert len(losses) == 8


@pytest.mark.parametrize("name", ["cuda:77", "meta", "nonsense"])
def test_devices_that_are_not_there(tree, capsys, name):
    assert train(tree, "--set", f"device={name}") == 2
    assert f"device must be auto or one of cpu, got '{name}'" in capsys.readouterr().err


def test_an_out_folder_among_the_data(tree, capsys):
    before = sorted(tree.rglob("*"))
    for out in (tree / "data" / "real", tree / "data" / "synthetic" / "red" / "run"):
        assert train(tree, "--out", str(out)) == 2
        assert "--out must be apart from the data" in capsys.readouterr().err
    assert train(tree, "--out", "") == 2
    assert "--out must be a folder, got ''" in capsys.readouterr().err
    assert sorted(tree.rglob("*")) == before


def test_files_of_the_run_are_not_written_over(finished, capsys):
    run = finished / "run"
    before = (run / "weights.csv").read_bytes()
    new = ["--synthetic", str(finished / "data" / "val")]
    assert main(["score", str(run), *new, "--out", str(run / "weights.csv")]) == 2
    assert "--out must be apart from the run's files" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "outcome.json")]) == 2
    assert (run / "weights.csv").read_bytes() == before


def test_sources_of_one_name_and_sources_named_twice(tree, capsys):
    assert _prefixes(["a/syn", "b/syn"]) == ["a/syn", "b/syn"]
    assert _prefixes(["x/a", "x/b"]) == ["a", "b"]
    other = tree / "more" / "synthetic"
    other.parent.mkdir()
    (tree / "data" / "val").rename(other)
    (tree / "data" / "val").symlink_to(other)
    assert train(tree, "--synthetic", str(other), epochs=2) == 0
    names = [row["file"] for row in table_of(tree)]
    assert len({*names}) == len(names) and "more/synthetic/red/0.png" in names
    capsys.readouterr()
    assert train(tree, "--synthetic", str(tree / "data" / "synthetic")) == 2
    assert "synthetic' is named twice; name it once" in capsys.readouterr().err


def test_class_names_that_rich_would_take_for_markup(tree, capsys):
    for role in ("real", "synthetic", "val", "test"):
        (tree / "data" / role / "red").rename(tree / "data" / role / "[red]x")
        (tree / "data" / role / "blue").rename(tree / "data" / role / "[bold]")
    assert train(tree, epochs=2) == 0
    capsys.readouterr()
    assert main(["select", str(tree / "run"), "--keep", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "[red]x" in out and "[bold]" in out


def test_a_selection_without_parquet_leaves_no_older_one(finished, tmp_path, monkeypatch):
    words = ["select", str(finished / "run"), "--keep", "0.5", "--out", str(tmp_path)]
    (tmp_path / "selected.parquet").write_text("of an earlier selection")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(words) == 0 and not (tmp_path / "selected.parquet").exists()
