"""`mts-fast train` as a whole, on small trees: what it leaves, goes on with, and refuses."""

import json

import pytest
import torch
from small_runs import COUNTS, records_of, table_of, train
from small_trees import COLOURS, small_model

from mts_fast.cli.main import main


def test_what_a_run_leaves(tree, capsys):
    assert train(tree) == 0
    out, err = capsys.readouterr()
    assert "MTS weights" in out and "weights.csv" in out and "note:" not in err
    rows = table_of(tree)
    assert len(rows) == 2 * (6 + 8)
    assert {row["role"] for row in rows} == {"real", "synthetic"}
    assert {row["class"] for row in rows} == {*COLOURS}
    assert all(0 < float(row["weight"]) < 1 for row in rows)
    (last,) = [r for r in records_of(tree) if r.get("arm") == "MTS weights"]
    assert last["test_accuracy"] >= 0.75 and last["samples"] == 8
    config = json.loads((tree / "run" / "config.json").read_text())
    assert config["epochs"] == 6 and config["optimizer"] == "sgd"
    from safetensors.torch import load_model

    model = small_model(2)
    load_model(model, tree / "run" / "model.safetensors")
    assert not list((tree / "run").rglob("checkpoint-*"))


def test_the_worst_group_is_reported(tree):
    lines = ["file,label,group"]
    for label in COLOURS:
        for i in range(COUNTS["test"]):
            lines.append(f"data/test/{label}/{i}.png,{label},{'land' if i else 'water'}")
    (tree / "test.csv").write_text("\n".join(lines))
    assert train(tree, "--test", str(tree / "test.csv"), epochs=2, without=("test",)) == 0
    records = [r for r in records_of(tree) if "arm" in r]
    assert len(records) == 4
    assert all(0 <= r["test_worst_group"] <= r["test_accuracy"] for r in records)


def test_a_second_run_trains_nothing(tree, monkeypatch):
    assert train(tree) == 0
    before, records = table_of(tree), records_of(tree)

    def trained(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr("mts_fast.pipeline.run.fit", trained)
    monkeypatch.setattr("mts_fast.pipeline.run.learn_weights", trained)
    assert train(tree) == 0 and table_of(tree) == before
    assert records_of(tree) == records


def test_a_broken_stage_runs_again(tree, capsys):
    assert train(tree, epochs=2) == 0
    before = table_of(tree)
    (done,) = (tree / "run" / "stages").glob("mts-*/done.safetensors")
    done.write_bytes(done.read_bytes()[:-40])
    capsys.readouterr()
    assert train(tree, epochs=2) == 0
    assert f"{done} is broken" in capsys.readouterr().err and table_of(tree) == before


@pytest.mark.parametrize("option", ["selector_lr=0.1", "compute=0.25", "compute=auto"])
def test_an_option_of_mts_leaves_other_trainings(tree, option):
    assert train(tree, epochs=2) == 0
    stages = {p.name for p in (tree / "run" / "stages").iterdir()}
    assert train(tree, "--set", option, epochs=2) == 0
    new = {p.name for p in (tree / "run" / "stages").iterdir()} - stages
    assert {name.rpartition("-")[0] for name in new} <= {
        "mts",
        "weights-first",
        "weights-refined-1",
    }


def test_without_validation_and_test(tree, capsys):
    assert train(tree, epochs=2, without=("val", "test")) == 0
    err = capsys.readouterr().err
    assert "no --val: 2 of 12 real samples were split off" in err and "no --test" in err


def test_class_weights_and_several_sources(tree):
    more = ["--synthetic", str(tree / "data" / "val"), "--set", "class_weights=inverse_frequency"]
    assert train(tree, *more, "--set", "clean=val", epochs=2) == 0
    names = {row["file"] for row in table_of(tree)}
    assert "synthetic/red/0.png" in names and "val/red/0.png" in names and "red/0.png" in names


def test_nothing_is_written_where_the_data_are_wrong(tree, capsys):
    (tree / "data" / "real" / "red" / "0.png").write_bytes(b"")
    (tree / "data" / "test" / "blue").rename(tree / "data" / "test" / "bleu")
    assert train(tree) == 2
    err = capsys.readouterr().err
    assert "class 'bleu'" in err or "'red/0.png' (0 bytes)" in err
    assert "nothing was trained" in err and not (tree / "run").exists()


def test_what_is_not_given_is_asked_for(capsys):
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    for name in ("real", "synthetic", "model"):
        assert f"'{name}' is not given; pass --{name}" in err


def test_learned_weights_are_the_same_after_an_interruption(tree, monkeypatch):
    from mts_fast.pipeline import fit

    assert train(tree) == 0
    whole = table_of(tree)
    real_save = fit.save_checkpoint

    class Stop(RuntimeError):
        pass

    def save_and_stop(folder, epoch, state, keep):
        path = real_save(folder, epoch, state, keep)
        if epoch == 4:
            raise Stop("stopped; go on")
        return path

    for stage in (tree / "run" / "stages").glob("mts-*"):
        (stage / "done.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(fit, "save_checkpoint", save_and_stop)
        assert train(tree) == 2
    torch.rand(3)
    assert train(tree) == 0 and table_of(tree) == whole
