"""What a launcher's variables mean, and what one of its processes does by itself."""

import pytest
import torch

from mts_fast._launcher import Place, place, timeout_minutes
from mts_fast.cli.main import main
from mts_fast.pipeline.config import load_config
from mts_fast.pipeline.inputs import device_of
from mts_fast.pipeline.memory import check_memory

GOOD = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher; None takes one away."""

    def launch(**changes):
        for name, value in {**GOOD, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    for name in GOOD:
        monkeypatch.delenv(name, raising=False)
    return launch


def test_places(launched):
    assert place() == Place(0, 1, 0, 1)
    launched()
    assert place() == Place(5, 8, 1, 4)
    launched(WORLD_SIZE="1", RANK="0", MASTER_ADDR=None)  # as in a pod of one process
    assert place() == Place(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "8"}, "RANK must be below WORLD_SIZE, also locally, got RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "got RANK=5, WORLD_SIZE=8, LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "also locally, got RANK=5"),
        ({"RANK": "-1"}, "RANK must be a whole number beside RANK, got '-1'"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK must be a whole number beside RANK, got None"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR and MASTER_PORT must be set"),
    ],
)
def test_variables_that_do_not_fit(launched, capsys, changes, said):
    launched(**changes)
    assert main(["train", "--model", "m"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mts-fast train: ") and said in err and "; start the command by" in err


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", ""])
def test_a_time_out_that_is_none(monkeypatch, text):
    assert timeout_minutes() == 24 * 60
    monkeypatch.setenv("MTS_FAST_TIMEOUT", "0.5")
    assert timeout_minutes() == 0.5
    monkeypatch.setenv("MTS_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match="MTS_FAST_TIMEOUT must be a number of minutes above 0"):
        timeout_minutes()


@pytest.mark.parametrize("words", [["doctor"], ["train", "--help"], ["recipe"], ["nothing"], []])
def test_other_ranks_leave_other_verbs_to_the_first(launched, capsys, words):
    launched()
    assert main(words) == 0
    assert capsys.readouterr() == ("", "")


def test_the_first_rank_runs_other_verbs(launched, capsys):
    launched(RANK="0", LOCAL_RANK="0")
    assert main(["doctor"]) == 0
    assert "ranks: 8, 4 of them on this host" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("rank", ["0", "3"])
def test_a_scheduler_without_local_numbers(launched, monkeypatch, capsys, rank):
    """It starts verbs that need none; those that ranks share say what is missing."""
    launched(RANK=rank)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert main(["doctor"]) == 0
    assert ("ranks: 8" in capsys.readouterr().out) == (rank == "0")
    assert main(["features", "x.npy", "--out", "y"]) == 2
    assert "LOCAL_RANK must be a whole number beside RANK" in capsys.readouterr().err


def config_of(device):
    return load_config(
        None,
        {"real": "r", "synthetic": ["s"], "model": "m", "device": device, "batch_size": 64},
        [],
    )


def test_each_rank_has_a_gpu(launched, monkeypatch):
    launched()
    assert device_of(config_of("auto")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device in ("auto", "cuda"):
        assert device_of(config_of(device)) == torch.device("cuda", 1)
    assert device_of(config_of("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="auto, cuda or cpu over ranks, got 'cuda:2"):
        device_of(config_of("cuda:2"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="GPUs must be one for each rank of a host, got 1, and"):
        device_of(config_of("auto"))


def test_ranks_of_a_host_share_its_memory(launched, monkeypatch):
    model, probe = torch.nn.Linear(100, 2), torch.randn(2, 100)
    # a step keeps three graphs of 400 bytes a sample; 64 samples are 8 on each of 8 ranks
    monkeypatch.setattr("mts_fast.pipeline.memory.available_memory", lambda: 4 * 8 * 1200)
    with pytest.raises(MemoryError, match="64 samples at a time"):
        check_memory(model, probe, config_of("cpu"))
    launched()
    check_memory(model, probe, config_of("cpu"))
    monkeypatch.setattr("mts_fast.pipeline.memory.available_memory", lambda: 4 * 8 * 1200 - 4)
    with pytest.raises(MemoryError, match=r"8 samples at a time.*micro_batch=4"):
        check_memory(model, probe, config_of("cpu"))
