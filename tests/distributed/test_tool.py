"""The command over ranks: what one process makes of the same options."""

import json

import pytest
import rank_tool
import torch
from features_command import S, X, Y
from rank_pool import SLOW
from safetensors.torch import save_file
from small_runs import make_tree, records_of
from small_trees import install_small_model
from tool_runs import assert_same_run, words_of

from mts_fast.features import DistributionSweep, FeatureTable

RANKS = 4
TIMES = ("seconds", "samples_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("ranks"))


def all_good(results):
    """Every rank has ended well, and the first one alone has said something."""
    assert [status for status, _, _ in results] == [0] * len(results), results[0][2]
    assert results[0][1] and not any(out or err for _, out, err in results[1:])
    return results[0]


def test_a_run_of_ranks_is_that_of_one_process(ranks, data):
    assert rank_tool.command(None, words_of(data, "one"))[0] == 0
    _, out, err = all_good(ranks.results(rank_tool.command, RANKS, words_of(data, "four")))
    assert "MTS weights" in out and "weights.csv" in out and err.count("dynamics:") == 1
    assert_same_run(data / "four", data / "one")
    ours, theirs = (_records(data, name) for name in ("four", "one"))
    assert len(ours) == len(theirs)
    for record, expected in zip(ours, theirs, strict=True):
        assert record == pytest.approx(expected, abs=1e-12)
    score = ["score", str(data / "one"), "--synthetic", str(data / "data" / "val"), "--out"]
    assert rank_tool.command(None, [*score, str(data / "one.csv")])[0] == 0
    all_good(ranks.results(rank_tool.command, RANKS, [*score, str(data / "four.csv")]))
    ours, theirs = ((data / name).read_text().split(",") for name in ("four.csv", "one.csv"))
    assert len(ours) == len(theirs) > 20
    for cell, expected in zip(ours, theirs, strict=True):
        assert cell == expected or float(cell.split()[0]) == pytest.approx(
            float(expected.split()[0]), abs=1e-6
        )
    assert not list(data.glob(".mts_fast-*"))


def _records(data, name):
    """Records without times; texts apart from numbers."""
    (data / "run").unlink(missing_ok=True)
    (data / "run").symlink_to(data / name)
    return [
        {k: v for k, v in record.items() if k not in (*TIMES, "folder", "stage", "arm")}
        for record in records_of(data)
    ]


@SLOW
@pytest.mark.parametrize(
    "options",
    [
        ("batch_size=2", "val_batch_size=2"),  # ranks without samples
        ("batch_size=28", "micro_batch=3", "val_batch_size=3", "crop=0.5", "jitter=0.2"),
        ("class_weights=inverse_frequency", "optimizer=adamw", "lr=0.01", "clean=val"),
    ],
)
def test_other_runs_of_ranks(ranks, data, options):
    name = options[0].replace("=", "")
    assert rank_tool.command(None, words_of(data, f"one-{name}", *options))[0] == 0
    all_good(ranks.results(rank_tool.command, RANKS, words_of(data, f"four-{name}", *options)))
    assert_same_run(data / f"four-{name}", data / f"one-{name}")


@SLOW
def test_a_run_goes_on_with_other_numbers_of_ranks(ranks, data):
    """Stages and checkpoints of one process on four ranks, and the other way."""
    words = words_of(data, "whole", "checkpoint_every=1")
    assert rank_tool.command(None, words)[0] == 0
    for first, second in ((None, ranks), (ranks, None)):
        out = "from-one" if first is None else "from-four"
        for crew, epochs in ((first, 2), (second, 2)):
            words = words_of(data, out, f"epochs={epochs}")
            if crew is first:
                run = rank_tool.command_until_the_third_checkpoint
                results = [run(None, words)] if crew is None else crew.run(run, RANKS, words)
                assert [status for status, _, _ in results] == [2] * len(results)
                assert list((data / out).rglob("checkpoint-*"))
            elif crew is None:
                assert rank_tool.command(None, words)[0] == 0
            else:
                all_good(crew.results(rank_tool.command, RANKS, words))
        assert_same_run(data / out, data / "whole")


def test_every_rank_has_the_first_ones_model(ranks, data):
    """Else its parameters would differ, which MTSStep refuses."""
    words = words_of(data, "random", "refinements=0", model="rank_tool:random_net")
    all_good(ranks.results(rank_tool.command, RANKS, words))


def test_batchnorm_is_said_to_be_per_rank(ranks, data, monkeypatch):
    install_small_model(monkeypatch)
    words = words_of(data, "norm", "epochs=1", "refinements=0", model="small_trees:small_model")
    _, _, err = all_good(ranks.results(rank_tool.command, RANKS, words))
    assert err.count("note: 1 BatchNorm layers normalise the samples of each rank by thems") == 1
    record = json.loads((data / "norm" / "outcome.json").read_text())
    assert any("BatchNorm" in remark for remark in record["remarks"])


@pytest.fixture
def features(tmp_path):
    save_file({"x": X, "y": Y, "s": S.to(torch.uint8)}, tmp_path / "pool.safetensors")
    pool = str(tmp_path / "pool.safetensors")
    words = ["features", f"{pool}:x", "--labels", f"{pool}:y", "--is-synthetic", f"{pool}:s"]
    return [*words, "--chunk", "20", "--out", str(tmp_path / "table.safetensors")]


def expected_table():
    sweep = DistributionSweep(X, Y, S, chunk=20)
    assert list(sweep.run())[-1] == 42  # 7 chunks
    return sweep.columns()


def assert_table(tmp_path):
    """Bit for bit that of one process."""
    table = dict(FeatureTable.load(tmp_path / "table.safetensors"))
    torch.testing.assert_close(table, expected_table(), rtol=0, atol=0)
    assert not (tmp_path / "table.safetensors.partial").exists()


def test_features_of_ranks_are_those_of_one_process(ranks, features, tmp_path):
    _, out, _ = all_good(ranks.results(rank_tool.command, RANKS, features))
    assert "9 columns of 131 samples" in out
    assert_table(tmp_path)


@pytest.mark.parametrize("units", [3, 17, 37])
@pytest.mark.parametrize("first", [None, RANKS])
def test_features_go_on_with_other_numbers_of_ranks(ranks, features, tmp_path, units, first):
    """Interrupted on one rank alone: all of them stop, and the others go on from there."""
    if first is None:
        results = [rank_tool.interrupted_features(None, features, units, 0)]
    else:
        results = ranks.results(rank_tool.interrupted_features, RANKS, features, units, 2)
    assert [status for status, _, _ in results] == [130] * len(results)
    assert "the same command goes on from there" in results[0][2]
    assert not any(out or err for _, out, err in results[1:])
    if first is None:
        counted = ranks.results(rank_tool.counted_units, RANKS, features)
    else:
        counted = [rank_tool.counted_units(None, features)]
    for status, (begun,) in counted:
        assert status == 0 and units < begun <= units + 2 * RANKS
    assert_table(tmp_path)


def test_features_refuse_files_that_differ(ranks, features, tmp_path):
    """As of hosts that have other files under one name."""
    other = X.clone()
    other[77] += 1
    save_file({"x": other, "y": Y, "s": S.to(torch.uint8)}, tmp_path / "other.safetensors")
    results = ranks.results(rank_tool.other_file, RANKS, features, "pool", "other", 3)
    assert [status for status, _, _ in results] == [2] * RANKS
    assert "FILE, --labels and --is-synthetic must be the same" in results[3][2]
    assert not (tmp_path / "table.safetensors").exists()


def test_what_a_team_exchanges(ranks):
    results = ranks.results(rank_tool.exchanges, RANKS)
    for rank, result in enumerate(results):
        assert result["led"]["rank"] == 0 and result["led"]["tensor"].tolist() == [0, 1, 2]
        assert result["part"] == [[0, 1], [2, 3], [4], [5]][rank]
        assert result["sizes"] == (2, 2, 1, 1) and result["total"] == 8.0
        tens, doubles = result["mapped"]
        assert tens.tolist() == list(range(0, 110, 10)) and doubles.dtype == torch.float64
        assert result["few"][0].tolist() == [0, 10, 20] and result["mean"] == [0.0, 0.0]
        assert result["in turn"] == (rank, [rank]) and result["seed"] == 7 + rank
        assert "ZeroDivisionError" in result["led error"] and "not here" in result["error"]
        kind = result["error"].partition(":")[0]
        assert kind == ("OSError" if rank == 2 else "FailedElsewhere")
