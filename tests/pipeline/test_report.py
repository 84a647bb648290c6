"""The page of a run: its verdict, its reasons, and that nothing of the data becomes markup."""

import json
import re

import pytest
import torch
from captum.attr import IntegratedGradients
from small_runs import make_tree, train
from small_trees import install_small_model

from mts_fast.cli.main import main
from mts_fast.pipeline.outcome import load_outcome
from mts_fast.pipeline.report.page import weights_by_source
from mts_fast.pipeline.report.reasons import explain
from mts_fast.pipeline.report.verdict import ArmRow, Interval, paired_difference, verdict, wilson
from mts_fast.pipeline.score import TrainedSelector

SCRIPT = "<script>alert(1)<script>"


def page_of(run, out):
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_what_stands_on_the_page(finished, tmp_path, capsys):
    html = page_of(finished / "run", tmp_path / "report.html")
    printed = capsys.readouterr().out
    outcome = load_outcome("report", finished / "run")
    (said,) = re.findall(r'class="verdict">(.*?)</p>', html)
    assert said.replace("&#34;", '"') in printed
    for arm, figures in outcome.arms.items():
        assert f">{arm}</th>" in html and f">{100 * figures['accuracy']:.1f} <span" in html
    best = max((row for row in outcome.rows if row.role == "synthetic"), key=lambda r: r.weight)
    assert f"<b>{best.weight:.3f}</b>" in html
    # nothing is loaded from elsewhere, and every picture has words
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses and all(a.startswith(("data:", "#")) for a in addresses)
    pictures = re.findall(r"<img [^>]*>", html)
    assert len(pictures) >= 2 + 2 * 8 and all(re.search(r'alt="[^"]+"', p) for p in pictures)
    assert page_of(finished / "run", tmp_path / "again.html") == html


def test_names_are_escaped(tmp_path, monkeypatch):
    install_small_model(monkeypatch)
    tree = make_tree(tmp_path)
    for role in ("real", "synthetic", "val", "test"):
        (tree / "data" / role / "red").rename(tree / "data" / role / SCRIPT)
    picture = next((tree / "data" / "synthetic" / SCRIPT).iterdir())
    picture.rename(picture.with_name('"><img src=x onerror=alert(2)>.png'))
    assert train(tree, epochs=2) == 0
    html = page_of(tree / "run", tmp_path / "report.html")
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in html


def test_groups_and_no_test_set(tree, tmp_path):
    lines = ["file,label,group"]
    for label in ("red", "blue"):
        lines += [f"data/test/{label}/{i}.png,{label},{'land' if i else 'sea'}" for i in range(4)]
    (tree / "test.csv").write_text("\n".join(lines))
    assert train(tree, "--test", str(tree / "test.csv"), epochs=2, without=("test",)) == 0
    assert "worst group %" in page_of(tree / "run", tmp_path / "report.html")
    assert train(tree, epochs=2, without=("test",)) == 0
    html = page_of(tree / "run", tmp_path / "report.html")
    assert "all figures flatter" in html and "worst group %" not in html


def test_suspects_are_wrong_labels(tree, tmp_path):
    """Two synthetic samples stand in the folder of the other class."""
    place = tree / "data" / "synthetic"
    for i in range(2):
        red, blue = place / "red" / f"{i}.png", place / "blue" / f"{i}.png"
        content = red.read_bytes()
        red.write_bytes(blue.read_bytes())
        blue.write_bytes(content)
    assert train(tree, epochs=20) == 0
    html = page_of(tree / "run", tmp_path / "report.html")
    section = html[html.index('id="labels"') : html.index('id="features"')]
    files = re.findall(r'class="file">([^<]*)<', section)
    assert sorted(files[:4]) == ["blue/0.png", "blue/1.png", "red/0.png", "red/1.png"]


def test_reasons_add_up_to_the_logit(finished):
    trained = TrainedSelector(load_outcome("report", finished / "run"))
    reasons = explain(trained)
    inputs = trained.pool_inputs()
    with torch.no_grad():
        logits = trained.selector(inputs, trained.labels, trained.is_synthetic)
        mean = trained.selector(0 * inputs, trained.labels, trained.is_synthetic)
    # 50 steps of a ReLU network: observed 1e-2 of the range
    error = (reasons.attributions.sum(1) - (logits - mean)).abs().max()
    assert float(error) < 0.05 * float((logits - mean).abs().max()) + 1e-4
    direct = IntegratedGradients(trained.selector).attribute(
        inputs[:1], additional_forward_args=(trained.labels[:1], trained.is_synthetic[:1])
    )
    at_centroid = trained.online.shape[1] - 1
    column = reasons.names.index("val_centroid")
    expected = float(direct[0, at_centroid])
    assert float(reasons.attributions[0, column]) == pytest.approx(expected, abs=1e-5)
    assert len(reasons.of(0)) == 2 and all("it (" in sentence for sentence in reasons.of(0))
    values = [value for _, value in reasons.importances()]
    assert values == sorted(values, reverse=True)


def test_intervals():
    # Newcombe (1998), table I: 81 of 263
    interval = wilson(81, 263)
    assert (interval.low, interval.high) == (
        pytest.approx(25.53, abs=0.01),
        pytest.approx(36.62, abs=0.01),
    )
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == pytest.approx(100)
    a = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    difference = paired_difference(a, b)
    half = 100 * 1.959964 * (1 / 3) ** 0.5 / 2
    assert difference.value == 50 and difference.high == pytest.approx(50 + half)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1, 3, "Selection paid: it is ahead of"),
        (-3, -1, "Selection did not pay: it is behind"),
        (-1, 3, "No difference is certain: selection is ahead of"),
        (-3, 1, "No difference is certain: selection is behind"),
        (-2, 2, "No difference is certain: selection is level with"),
    ],
)
def test_the_verdict_is_about_the_strongest_arm(low, high, said):
    rows = [
        ArmRow("weak", Interval(50, 0, 0), None, Interval(30, 20, 40)),
        ArmRow("strong", Interval(80, 0, 0), None, Interval((low + high) / 2, low, high)),
        ArmRow("ours", Interval(82, 0, 0), None, None),
    ]
    assert verdict(rows).startswith(said) and "“strong”" in verdict(rows)


def test_weights_by_class_and_source(finished):
    outcome = load_outcome("report", finished / "run")
    weights = torch.arange(28.0, dtype=torch.float64)
    table = weights_by_source(outcome, weights)
    assert [(row.label, row.role, row.count) for row in table] == [
        *(("blue", "real", 6), ("blue", "synthetic", 8)),
        *(("red", "real", 6), ("red", "synthetic", 8)),
    ]
    assert sum(row.count * row.mean for row in table) == pytest.approx(float(weights.sum()))
    assert table[0].quantiles[1] == 2.5


def test_texts_and_options_of_a_text_run_are_shown(finished, tmp_path):
    """A store of texts instead of pixels: excerpts, escaped."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    record = json.loads((run / "outcome.json").read_text())
    texts = [f"text {i} <b>bold</b> " + "word " * 100 for i in range(60)]
    (run / "stages" / "texts.json").write_text(json.dumps(texts))
    (run / "outcome.json").write_text(json.dumps({**record, "store": "stages/texts.json"}))
    html = page_of(run, tmp_path / "report.html")
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "…</blockquote>" in html
    assert "<b>bold" not in html
