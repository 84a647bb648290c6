"""Runs of the demo: summaries, finished jobs that are reused, studies."""

import json
import re
from dataclasses import replace

import pytest
from rank_pool import SLOW

from mts_fast.cli.main import main
from mts_fast.demo import gsnr, sampled_gradient
from mts_fast.demo import run as demo_run
from mts_fast.demo.data import make_scenario
from mts_fast.demo.jobs import (
    Job,
    JobResult,
    available_arms,
    missing_packages,
    train_job,
)
from mts_fast.demo.run import run_jobs
from mts_fast.demo.store import fingerprint, load_result, save_result
from mts_fast.demo.studies import STUDIES
from mts_fast.demo.summary import strongest_baseline, summarize
from mts_fast.demo.training import SETTINGS

DATA = "coloured-digits"
JOB = Job(DATA, 400, ("everything alike",), settings={"steps": 3})


def result_of(seed, **accuracy):
    names = {
        **{"alike": "everything alike", "ours": "MTS weights"},
        **{"without": "the recipe without MTS", "dro": "group DRO, true groups"},
    }
    named = {names[k]: v for k, v in accuracy.items()}
    return JobResult(seed, accuracy=named, seconds=dict.fromkeys(named, 1.0))


def test_a_summary_has_means_errors_and_paired_differences():
    results = [result_of(0, alike=0.5, ours=0.7), result_of(1, alike=0.7, ours=0.8)]
    rows = summarize(results)
    assert rows["everything alike"]["accuracy"] == pytest.approx(60)
    assert rows["everything alike"]["accuracy_se"] == pytest.approx(10)
    assert rows["everything alike"]["ahead"] == pytest.approx(15)
    assert rows["everything alike"]["ahead_se"] == pytest.approx(5)
    assert "ahead" not in rows["MTS weights"]
    assert summarize(results[:1])["MTS weights"]["accuracy_se"] is None


def test_the_strongest_baseline_knows_no_groups_and_is_not_ours():
    rows = summarize([result_of(0, alike=0.5, ours=0.7, without=0.8, dro=0.9)])
    assert strongest_baseline(rows) == "everything alike"


def test_a_finished_job_is_reused(tmp_path, monkeypatch):
    first = run_jobs([JOB], tmp_path)
    monkeypatch.setattr(demo_run, "run_tasks", lambda work, left, *_: [1 / 0 for _ in left])
    assert run_jobs([JOB], tmp_path) == first


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 401},
        {"settings": {"steps": 4}},
        {"options": {"lr": 0.1}},
        {"scenario": {"val_per_class": 4}},
        {"arms": ("validation alone",)},
    ],
)
def test_another_job_is_not(change, tmp_path):
    save_result(tmp_path, JOB, result_of(400, alike=0.5))
    assert load_result(tmp_path, JOB) == result_of(400, alike=0.5)
    other = replace(JOB, **change)
    assert fingerprint(other) != fingerprint(JOB)
    assert load_result(tmp_path, other) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": 3, "result": {}}'])
def test_a_damaged_file_of_a_job_is_trained_again(text, tmp_path):
    save_result(tmp_path, JOB, train_job(JOB, lambda _: None))
    (file,) = (tmp_path / "jobs").iterdir()
    file.write_text(text)
    assert load_result(tmp_path, JOB) is None


@SLOW
def test_an_interrupted_run_goes_on(tmp_path, capsys):
    """The second of two seeds alone is trained, and the table is of both."""
    arguments = ["demo", "--steps", "2", "--first-seed", "7", "--out", str(tmp_path)]
    assert main([*arguments, "--seeds", "1"]) == 0
    before = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    capsys.readouterr()
    assert main([*arguments, "--seeds", "2"]) == 0
    assert "1 of 2 were finished by an earlier run" in capsys.readouterr().err
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["seeds"] == [7, 8] and record["runs"][0] == before
    assert record["summary"]["MTS weights"]["accuracy_se"] is not None


@pytest.mark.parametrize("name", STUDIES)
def test_variants_of_a_study_differ_and_can_be_made(name):
    variants = STUDIES[name].variants(SETTINGS[DATA])
    jobs = [
        Job(DATA, 1, (), name, settings=v.settings, options=v.options, scenario=v.scenario)
        for v in variants.values()
    ]
    assert len({fingerprint(job) for job in jobs}) == len(jobs) > 2
    for job in jobs:
        replace(SETTINGS[DATA], **job.settings)
        make_scenario(DATA, 1, changes=job.scenario)


@SLOW
def test_a_study_has_a_row_for_every_variant(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--study", "selector-every", "--seeds", "2", "--steps", "4"]
    assert main(["demo", *arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text())
    assert list(record["summary"]) == ["1", "2", "4", "8"]
    for label, rows in record["summary"].items():
        mean, error = rows["MTS itself"]["accuracy"], rows["MTS itself"]["accuracy_se"]
        assert re.search(rf"{label} +│ +{mean:.1f} ± {error:.1f}", printed)
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_gsnr_by_batch_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gsnr, "DRAWS", 6)
    monkeypatch.setitem(gsnr.SETTINGS, DATA, replace(SETTINGS[DATA], steps=40))
    rows = gsnr.run_gsnr_study(DATA, 3, tmp_path, None, sizes=(32, 256))
    assert [row["batch_size"] for row in rows] == [32, 256]
    assert all(row["gsnr_over_draws"] >= 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert (tmp_path / "gsnr_by_batch_size.png").exists() and "256" in capsys.readouterr().out


def test_gradients_of_sampled_steps_by_cost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampled_gradient, "DRAWS", 24)
    monkeypatch.setitem(gsnr.SETTINGS, DATA, replace(SETTINGS[DATA], steps=40))
    steps = ((512, None), (64, None), (512, 64))
    rows = sampled_gradient.run_gradient_study(DATA, 3, tmp_path, None, steps)
    assert [row["cost"] for row in rows] == [2560, 320, 832]
    whole, small, sampled = (row["classifier_error"] for row in rows)
    assert whole < sampled < small  # a draw of 64 of 512 tells more than 64
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert "832" in capsys.readouterr().out


def test_the_published_table_stands_beside(monkeypatch):
    rows = summarize([result_of(0, alike=0.5, ours=0.7)])
    published = {"MTS weights": {"accuracy": 81.24, "accuracy_se": 0.5}}
    _, columns, lines = demo_run.render(DATA, rows, 1, "±", published)
    assert columns[-1] == "published, 10 seeds"
    assert lines[0][-1] == "" and lines[1][-1] == "81.2 ± 0.5"


def test_a_package_that_is_missing_leaves_its_arm_out(monkeypatch):
    monkeypatch.setattr("mts_fast.demo.jobs.importlib.util.find_spec", lambda _: None)
    assert missing_packages() == {"confident learning": "cleanlab"}
    assert "confident learning" not in available_arms(DATA)


def test_a_change_of_the_code_trains_again(monkeypatch):
    before = fingerprint(JOB)
    monkeypatch.setattr("mts_fast.demo.store._source", lambda: "other code")
    assert fingerprint(JOB) != before
