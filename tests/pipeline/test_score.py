"""The selector of a run on samples that it was not trained on."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import table_of, train

from mts_fast.cli.main import main
from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.pool import selector_inputs
from mts_fast.pipeline.score import TrainedSelector, rank_correlation, score_samples


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_new_samples_get_weights(finished, tmp_path, capsys):
    new = tmp_path / "new"
    shutil.copytree(finished / "data" / "synthetic", new)
    before = {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()}
    out = tmp_path / "scores.csv"
    words = ["score", str(finished / "run"), "--synthetic", str(new), "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "of the run" in printed and "Rank correlation" in printed
    rows = rows_of(out)
    assert len(rows) == 16 and all(0 < float(row["weight"]) < 1 for row in rows)
    assert {row["path"] for row in rows} == {str(path) for path in new.rglob("*.png")}
    assert {p: p.read_bytes() for p in (finished / "run").rglob("*") if p.is_file()} == before
    assert main(words) == 0 and rows_of(out) == rows


def test_features_of_the_pool_give_what_the_selector_said(finished):
    outcome = load_outcome("score", finished / "run")
    trained = TrainedSelector(outcome)
    inputs = trained.pool_inputs()
    assert len(inputs) == 28 and torch.isfinite(inputs).all()
    weights = trained.weights(inputs, trained.labels, trained.is_synthetic)
    logits = trained.selector(inputs, trained.labels, trained.is_synthetic)
    assert torch.equal(weights, logits.sigmoid())


def test_online_features_are_standardised_by_the_pool():
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(50, 4, generator=generator)
    new, offline = torch.rand(5, 4, generator=generator), torch.rand(5, 2, generator=generator)
    inputs = selector_inputs(new, pool, offline)
    nearest = (new[:, :3] - pool[:, :3].mean()) / pool[:, :3].std(correction=0)
    centroid = (new[:, 3:] - pool[:, 3].mean()) / pool[:, 3].std(correction=0)
    # the variance, 1/12, has an epsilon of 1e-8; float32
    assert torch.allclose(inputs, torch.cat([nearest, centroid, offline], 1), atol=1e-4)


def test_wrong_labels_weigh_less(tree, tmp_path):
    """Half of the synthetic samples show the other class; so do half of the new ones."""
    rng = np.random.default_rng(1)
    colours = {"red": (200, 60, 50), "blue": (60, 80, 210)}
    for place, count in ((tree / "data" / "synthetic", 40), (tmp_path / "new", 20)):
        shutil.rmtree(place, ignore_errors=True)
        for label, other in (("red", "blue"), ("blue", "red")):
            (place / label).mkdir(parents=True)
            for i in range(count):
                shown = label if i % 2 else other
                pixels = np.array(colours[shown]) + rng.normal(0, 20, (8, 8, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(place / label / f"{i:03d}.png")
    assert train(tree, "--set", "selector_lr=0.02", epochs=20) == 0
    table = [row for row in table_of(tree) if row["role"] == "synthetic"]
    outcome = load_outcome("score", tree / "run")
    scores = score_samples(outcome, [str(tmp_path / "new")], None, print)
    for rows in (
        [(row["file"], float(row["weight"])) for row in table],
        [(row.file, row.weight) for row in scores.rows],
    ):
        right = [weight for name, weight in rows if int(name[-7:-4]) % 2]
        wrong = [weight for name, weight in rows if not int(name[-7:-4]) % 2]
        assert np.mean(right) > np.mean(wrong) + 0.05
    assert scores.agreement > 0.5


def test_refusals(finished, tmp_path, capsys):
    run = str(finished / "run")
    new = tmp_path / "new"
    shutil.copytree(finished / "data" / "synthetic", new)
    (new / "red").rename(new / "rot")
    assert main(["score", run, "--synthetic", str(new)]) == 2
    err = capsys.readouterr().err
    assert "has class 'rot', which the run does not know; name one of 'blue', 'red'" in err
    (new / "rot").rename(new / "red")
    (new / "red" / "0.png").write_bytes(b"")
    assert main(["score", run, "--synthetic", str(new)]) == 2
    assert "'red/0.png' (0 bytes)" in capsys.readouterr().err
    assert not (finished / "run" / "scores.csv").exists()
    out = str(tmp_path / "scores.csv")
    assert main(["score", run, "--synthetic", str(new), "--on-corrupt", "skip", "--out", out]) == 0
    assert len(rows_of(out)) == 15
    assert main(["score", run, "--synthetic", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_stage_that_is_gone(tree, capsys):
    assert train(tree, epochs=2) == 0
    (done,) = (tree / "run" / "stages").glob("dynamics-*/done.safetensors")
    done.unlink()
    assert main(["score", str(tree / "run"), "--synthetic", str(tree / "data" / "val")]) == 2
    assert "run `mts-fast train` again" in capsys.readouterr().err
    assert train(tree, epochs=2) == 0
    assert main(["score", str(tree / "run"), "--synthetic", str(tree / "data" / "val")]) == 0


def test_rank_correlation():
    a = torch.tensor([1.0, 5.0, 2.0, 9.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.tensor([1.0, 2.0, 5.0, 9.0])) == pytest.approx(0.8)
