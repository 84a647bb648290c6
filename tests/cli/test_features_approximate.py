"""`mts-fast features --search approximate`: the table with its recall, and interruptions."""

import signal

import numpy as np
import pytest
from comparison import assert_bitwise
from features_command import run, signalled
from searched_pools import clusters

from mts_fast.features import Approximate, DistributionSweep, FeatureTable, distribution_features

pytest.importorskip("faiss")

X, Y, S = clusters(1500)
OPTIONS = ("--search", "approximate", "--exact-below", "400", "--recall", "0.9", "--chunk", "400")
SEARCH = Approximate(recall=0.9, exact_below=400)


@pytest.fixture
def files(tmp_path):
    for name, array in {"x": X, "y": Y, "s": S}.items():
        np.save(tmp_path / f"{name}.npy", array.numpy())
    x, y, s = (str(tmp_path / f"{name}.npy") for name in "xys")
    return [x, "--labels", y, "--is-synthetic", s]


def expected():
    return distribution_features(X, Y, S, search=SEARCH, chunk=400)


def test_the_table_has_its_recall(files, tmp_path, capsys):
    assert run(files, tmp_path, *OPTIONS) == 0
    table = FeatureTable.load(tmp_path / "table.safetensors")
    columns = expected()
    assert_bitwise(dict(table), dict(columns))
    assert table.notes == columns.notes
    note = columns.notes["knn5_label_agreement"]
    said = f"knn5_label_agreement: recall {note['recall']} ({note['search']})"
    assert said in capsys.readouterr().out


# units: 4 for centroids, the sample, 4 for the search, a pack, 4 for distances
@pytest.mark.parametrize("units", [2, 5, 7, 12])
def test_interrupted_and_resumed(units, files, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(DistributionSweep, "run", signalled(units, signal.SIGTERM)[0])
        assert run(files, tmp_path, *OPTIONS) == 130
    assert f"interrupted at {units + 1} of 14; the same command" in capsys.readouterr().err
    for flag, value, other in (
        ("--recall", "0.9", "0.8"),
        ("--exact-below", "400", "500"),
        ("--search", "approximate", "exact"),
    ):
        changed = [other if word == value else word for word in OPTIONS]
        if flag == "--exact-below":
            changed[-1] = "400"
        assert run(files, tmp_path, *changed) == 2
        assert f"features: {flag} must be {value}, as in" in capsys.readouterr().err
    assert run(files, tmp_path, *OPTIONS) == 0
    table = FeatureTable.load(tmp_path / "table.safetensors")
    assert_bitwise(dict(table), dict(expected()))
    assert table.notes == expected().notes


def test_a_file_that_changes_while_it_is_searched(files, tmp_path, monkeypatch, capsys):
    whole = DistributionSweep.run

    def change_after(self):
        for units in whole(self):
            if units == 4:
                np.save(tmp_path / "other.npy", X.numpy())
                with open(files[0], "r+b") as stream:
                    stream.seek(-4, 2)
                    stream.write(b"\0\0\0\0")
            yield units

    monkeypatch.setattr(DistributionSweep, "run", change_after)
    assert run(files, tmp_path, *OPTIONS) == 2
    assert "must be unchanged while it is searched" in capsys.readouterr().err


def test_refusals(files, tmp_path, capsys):
    assert run(files, tmp_path, *OPTIONS, "--recall", "1.5") == 2
    said = "features: --recall must be a finite number above 0 and at most 1, got 1.5"
    assert said in capsys.readouterr().err
    assert run(files, tmp_path, "--search", "faiss") == 2
    assert "--search" in capsys.readouterr().err
