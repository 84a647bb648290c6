"""The command under torchrun itself: one voice, one table, and an end in any case."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from features_command import S, X, Y
from rank_pool import SLOW
from safetensors.torch import save_file
from small_runs import make_tree
from tool_runs import OPTIONS, assert_same_run, words_of

from mts_fast.features import FeatureTable, distribution_features

PATIENCE = 120  # seconds, of a command
# how long torchrun waits for ranks that it has asked to end
END = 40
HELPERS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + "/helpers"


def start(words, ranks, folder, **variables):
    """The command on some ranks, or by itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = [os.environ.get("PYTHONPATH", ""), HELPERS, str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else []), "-m", "mts_fast_command", *words],
        cwd=folder,
        env=os.environ | settings | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, patience=PATIENCE):
    """(exit status, stdout, lines of the command on stderr, all of stderr)."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, [line for line in err.splitlines() if "mts-fast" in line], err


def test_features_of_two_ranks(tmp_path):
    save_file({"x": X, "y": Y, "s": S.to(torch.uint8)}, tmp_path / "pool.safetensors")
    words = ["features", "pool.safetensors:x", "--labels", "pool.safetensors:y", "--chunk", "40"]
    words += ["--is-synthetic", "pool.safetensors:s", "--out", "table.safetensors"]
    status, out, _, err = ended(start(words, 2, tmp_path))
    assert status == 0, err
    assert out == "table.safetensors: 9 columns of 131 samples\n"
    table = dict(FeatureTable.load(tmp_path / "table.safetensors"))
    expected = distribution_features(X, Y, S, chunk=40)
    torch.testing.assert_close(table, expected, rtol=0, atol=0)


def test_an_error_is_told_once(tmp_path):
    make_tree(tmp_path)
    words = words_of(tmp_path, "run")
    words[words.index("--synthetic") + 1] = "data/none"
    status, out, said, err = ended(start(words, 2, tmp_path))
    assert (status, out) == (1, "")  # torchrun's own status; those of the ranks are in its report
    assert len(re.findall(r"exitcode +: 2 ", err)) == 2
    (line,) = said
    assert line.startswith("mts-fast train: the data must be free of errors, got 1 problem")
    assert err.count("--synthetic 'data/none' does not exist") == 1
    assert not (tmp_path / "run").exists()


RAISING = """
import os
from rank_tool import Net

class Raising(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if os.environ["RANK"] == os.environ["BAD_RANK"] and self.calls == 15:
            if os.environ["WAY"] == "dies":
                os._exit(9)
            raise OSError(self.calls, "no forward here")
        return super().forward(x)

def net(num_classes):
    return Raising(num_classes)
"""


@SLOW
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("way", ["raises", "dies"])
def test_a_rank_that_fails_ends_all(tmp_path, way, rank):
    make_tree(tmp_path)
    (tmp_path / "raising.py").write_text(RAISING)
    words = words_of(tmp_path, "run", "epochs=20", model="raising:net")
    began = time.monotonic()
    process = start(words, 3, tmp_path, BAD_RANK=rank, WAY=way)
    status, out, said, err = ended(process)
    assert (status, out) == (1, "") and time.monotonic() - began < PATIENCE
    if way == "raises":
        (line,) = said
        assert line.startswith("mts-fast train: " + ("" if rank == "0" else "rank 1: "))
        assert "no forward here" in line
    else:
        assert len(said) <= 1 and re.search(r"exitcode +: 9 ", err), err
    # nothing holds the folder any more
    again = start(words, 1, tmp_path, BAD_RANK="none", WAY=way, RANK="0", WORLD_SIZE="1")
    status, _, _, err = ended(again)
    assert status == 0, err


@SLOW
@pytest.mark.parametrize(
    ("number", "of_a_rank"),
    [(signal.SIGKILL, True), (signal.SIGINT, False), (signal.SIGTERM, False)],
)
def test_interrupted_on_two_ranks_and_gone_on_with(tmp_path, number, of_a_rank):
    """By other numbers of ranks, to the result of one process that nobody has interrupted."""
    make_tree(tmp_path)
    assert OPTIONS[0] == "epochs=2"
    words, whole = (words_of(tmp_path, name, "epochs=40") for name in ("run", "whole"))
    assert ended(start(whole, 1, tmp_path))[0] == 0
    process = start(words, 2, tmp_path)
    wait_for(lambda: list((tmp_path / "run").rglob("checkpoint-*")))
    time.sleep(1)
    if of_a_rank:
        os.kill(ranks_of(process)[1], number)
    else:
        process.send_signal(number)
    status, out, said, _ = ended(process, END)
    assert status != 0 and out == "" and len(said) <= 1
    assert list((tmp_path / "run").rglob("checkpoint-*"))
    process = start(words, 3, tmp_path)
    wait_for(lambda: list((tmp_path / "run").glob("stages/mts-*/checkpoint-*")))
    process.send_signal(signal.SIGINT)
    assert ended(process, END)[0] != 0
    assert ended(start(words, 1, tmp_path))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def ranks_of(launcher):
    """Process ids of a launcher's ranks."""
    lists = f"/proc/{launcher.pid}/task/{launcher.pid}/children"
    with open(lists) as file:
        return [int(pid) for pid in file.read().split()]
