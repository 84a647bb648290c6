"""Data sets of Hugging Face, saved to a folder: images and texts, splits and labels."""

import numpy as np
import pytest
from PIL import Image
from small_runs import COUNTS, table_of
from small_trees import COLOURS, install_small_model

from mts_fast.cli.main import main
from mts_fast.pipeline.config import load_config
from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.data.hub import is_dataset, parts_of, read_dataset
from mts_fast.pipeline.decode import scan
from mts_fast.pipeline.sources import read_sources

datasets = pytest.importorskip("datasets")


def images_of(count, seed, labels=("blue", "red")):
    """A data set of `count` noisy images of each class."""
    rng = np.random.default_rng(seed)
    pixels, classes = [], []
    for label in labels:
        for _ in range(count):
            noisy = np.array(COLOURS[label]) + rng.normal(0, 20, (8, 8, 3))
            pixels.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
            classes.append(labels.index(label))
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))}
    )
    return datasets.Dataset.from_dict({"picture": pixels, "label": classes}, features)


@pytest.fixture
def saved(tmp_path):
    """Real, val and test as splits of one data set, synthetic ones as another."""
    words = {"real": "train", "val": "validation", "test": "test"}
    splits = {word: images_of(COUNTS[role], i) for i, (role, word) in enumerate(words.items())}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    images_of(COUNTS["synthetic"], 9).save_to_disk(tmp_path / "generated")
    return tmp_path


def test_a_run_on_saved_data_sets(saved, monkeypatch):
    install_small_model(monkeypatch)
    words = ["train", "--model", "small_models:small_model", "--out", str(saved / "run")]
    for role in ("real", "val", "test"):
        words += [f"--{role}", str(saved / "splits")]
    words += ["--synthetic", str(saved / "generated")]
    for option in ("epochs=6", "dynamics_epochs=2", "batch_size=8", "lr=0.1", "refinements=0"):
        words += ["--set", option]
    assert main([*words, "--set", "workers=1"]) == 0
    rows = table_of(saved)
    assert [row["file"] for row in rows[:2]] == ["train:0", "train:1"] and len(rows) == 28
    assert {row["class"] for row in rows} == {"red", "blue"}
    assert main(["select", str(saved / "run"), "--keep", "0.5", "--no-real"]) == 0
    lines = (saved / "run" / "selected" / "selected.csv").read_text().splitlines()[1:]
    positions = [int(line.partition(",")[0].partition(":")[2]) for line in lines]
    assert len(positions) == 8 and positions == sorted(positions) and positions[-1] < 16
    assert main(["score", str(saved / "run"), "--synthetic", f"hf:{saved}/splits:test"]) == 0


def test_pictures_are_those_of_the_files(saved, tmp_path):
    findings = Findings()
    samples = read_dataset("real", str(saved / "splits"), None, findings, skip_empty=False)
    assert not findings.errors and samples.counts() == {"red": 6, "blue": 6}
    first = datasets.load_from_disk(str(saved / "splits"))["train"][0]["picture"]
    (tmp_path / "first.png").write_bytes(samples.contents[0].read_bytes())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "first.png")), np.asarray(first))


def test_texts_with_labels_as_words(tmp_path):
    columns = {"text": ["fine", "", "dull", None], "label": ["007", "NA", "b", "b"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "texts")
    options = {"real": str(tmp_path / "texts"), "synthetic": [str(tmp_path / "texts")]}
    options |= {"model": "m", "text_column": "text"}
    findings = Findings()
    read_sources(load_config(None, options, ()), findings)
    assert "2 rows have no text: '1', '3'" in findings.errors[0]
    findings = Findings()
    config = load_config(None, {**options, "on_corrupt": "skip"}, ())
    samples = read_sources(config, findings)["real"]
    assert samples.labels == ("007", "b") and samples.contents == ("fine", "dull")
    assert [name.partition(":")[2] for name in samples.names] == ["0", "2"]


def test_what_stops(saved, monkeypatch):
    def told(source, role="real", column=None):
        findings = Findings()
        assert read_dataset(role, source, column, findings, skip_empty=False) is None
        (error,) = findings.errors
        return error

    folder = saved / "splits"
    assert "has no split dev; append one of ':train', ':validation'" in told(f"hf:{folder}:dev")
    datasets.DatasetDict({"part": images_of(1, 0)}).save_to_disk(saved / "only")
    assert "has no split test or testing; append one of ':part'" in told(f"hf:{saved}/only", "test")
    assert "has no column text; name one of 'picture', 'label'" in told(str(folder), column="text")
    images_of(1, 0).rename_column("label", "kind").save_to_disk(saved / "kinds")
    assert "has no column label; name one of" in told(str(saved / "kinds"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "cannot be loaded" in told("hf:nobody/no-such-data-set")


def test_a_row_without_a_label_or_an_image(tmp_path):
    data = images_of(1, 0)
    columns = {"picture": [data[0]["picture"], None, data[1]["picture"]], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(columns, data.features).save_to_disk(tmp_path / "data")
    findings = Findings()
    samples = read_dataset("real", str(tmp_path / "data"), None, findings, skip_empty=False)
    assert "1 row has no label: '2'" in findings.errors[0]
    assert scan(samples.contents, lambda _: None)[1].error == "the row has no image"


def test_sources():
    assert parts_of("hf:a/b@c:d") == ("a/b", "c", "d") and parts_of("hf:a/b") == ("a/b", None, None)
    assert parts_of("x:y") == ("x:y", None, None)
    assert is_dataset("hf:a") and not is_dataset("photos")
