"""Recipes: valid options, published numbers, what the checker sees, and runs of all of them."""

import csv
import json

import pytest
from small_bert import write_bert
from small_trees import colours_of, install_small_model, write_images

from mts_fast.cli.main import main
from mts_fast.pipeline.config import Config, load_config
from mts_fast.pipeline.recipes import load_recipe, recipe_names
from mts_fast.pipeline.recipes.configure import configure

DATA = {"real": "a", "synthetic": ["b"], "val": "c"}
SHORT = ("epochs=2", "dynamics_epochs=1", "batch_size=8", "refinements=0", "image_size=16")
COUNTS = {"real": 3, "synthetic": 4, "val": 2, "test": 2}
IMAGE_RECIPES = [name for name in recipe_names() if name != "reviews"]
# (epochs, schedule, warm-up, decay, selector's warm-up, selector's rate, validation batch, rate in
# the hypergradient, weight decay, nesterov) of the published runs
PUBLISHED = {
    "waterbirds": (450, "cosine", 0, (), 0, 1e-3, 128, 1e-2, 1e-4, False),
    "texture": (250, "step", 25, (225,), 25, 1e-4, 256, 1e-3, 5e-4, True),
    "celeba": (300, "step", 30, (270,), 30, 5e-4, 256, 1e-3, 5e-4, True),
    "pacs-art-cartoon": (1000, "step", 100, (900,), 100, 1e-4, 128, 1e-3, 5e-4, True),
    "pacs-art-photo": (1000, "step", 100, (900,), 100, 5e-4, 128, 1e-3, 5e-4, True),
    "pacs-art-sketch": (1000, "step", 100, (900,), 100, 5e-4, 256, 1e-3, 5e-4, True),
    "pacs-cartoon-art": (800, "step", 80, (720,), 80, 1e-4, 208, 1e-3, 5e-4, True),
    "pacs-cartoon-photo": (800, "step", 80, (720,), 80, 1e-3, 128, 1e-3, 5e-4, True),
    "pacs-cartoon-sketch": (800, "step", 80, (720,), 80, 1e-4, 256, 1e-3, 5e-4, True),
}


def config_of(name):
    return load_config(None, DATA, [], load_recipe("train", "--recipe", name).options)


def write_lists(folder, role, paths, groups):
    """A list beside the folder of images."""
    with (folder / f"{role}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "group"])
        for i, path in enumerate(paths):
            name, label = path.relative_to(folder).as_posix(), path.parent.name
            writer.writerow([name, label, f"{label} {groups[i % len(groups)]}"])


def lay_out(recipe, folder):
    """Small images where a recipe expects them; groups in lists; an empty file of weights."""
    classes = recipe.classes or ("banded", "dotted")
    for seed, (role, part) in enumerate(recipe.parts.items()):
        paths = write_images(
            folder / part.path, colours_of(classes), COUNTS[role], seed=seed, size=16
        )
        if part.groups:
            write_lists(folder, part.path, paths, ("on land", "on water"))
    (folder / "resnet50-small.pth").write_bytes(b"")
    return folder


def lay_out_reviews(folder):
    words = {"good": "fine lovely warm", "bad": "dull cold broken"}
    for role, count in COUNTS.items():
        with (folder / f"{role}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for label, text in words.items():
                writer.writerows([f"{text} {role} {i}", label] for i in range(count))
    return folder


@pytest.fixture
def waterbirds(tmp_path, monkeypatch):
    """The folder of a complete recipe."""
    install_small_model(monkeypatch)
    (tmp_path / "data").mkdir()
    return lay_out(load_recipe("recipe", "NAME", "waterbirds"), tmp_path / "data")


def train(name, data, *more, model="small_models:small_model"):
    words = ["train", "--recipe", name, "--out", str(data.parent / "run"), "--model", str(model)]
    words += [word for option in SHORT for word in ("--set", option)]
    return main([*words, *more])


@pytest.mark.parametrize("name", recipe_names())
def test_options_are_those_of_a_run(name):
    recipe = load_recipe("train", "--recipe", name)
    assert {*recipe.options} <= {*Config.model_fields} - {"real", "synthetic", "val", "test"}
    config = config_of(name)
    # nothing in a TOML file is silently converted to another value
    assert {key: config.model_dump()[key] for key in recipe.options} == {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recipe.options.items()
    }
    assert set(recipe.parts) == set(COUNTS) and recipe.notes
    assert config.warmup_epochs < config.epochs
    assert all(config.warmup_epochs < decay < config.epochs for decay in config.decay_epochs)


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_numbers_are_the_published_ones(name):
    c = config_of(name)
    assert PUBLISHED[name] == (
        *(c.epochs, c.schedule, c.warmup_epochs, c.decay_epochs, c.selector_warmup_epochs),
        *(c.selector_lr, c.val_batch_size, c.hypergradient_lr, c.weight_decay, c.nesterov),
    )
    assert (c.batch_size, c.lr, c.momentum, c.seed, c.optimizer) == (1024, 1e-3, 0.9, 1, "sgd")
    assert (c.selector_weight_decay, c.dynamics_epochs, c.dynamics_batch_size) == (1e-4, 30, 128)
    augmented = (0.8, 0.4, True) if name != "waterbirds" else (1.0, 0.0, False)
    assert (c.crop, c.jitter, c.flip) == augmented
    assert c.class_weights == ("inverse_frequency" if name == "waterbirds" else "none")
    assert c.model == "torchvision:resnet50" and c.image_size == 224


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_a_run_of_images(name, tmp_path, monkeypatch, capsys):
    install_small_model(monkeypatch)
    data = tmp_path / "data"
    data.mkdir()
    recipe = load_recipe("train", "--recipe", name)
    lay_out(recipe, data)
    assert main(["recipe", name, "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "Complete." in out and "Missing" not in out
    assert train(name, data, "--data", str(data)) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["epochs"] == 2 and config["selector_lr"] == recipe.options["selector_lr"]
    # the recipe's weights are those of its own model
    assert config["pretrained"] is None
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, metrics) if "arm" in record]
    assert len(records) == 4
    assert all(("test_worst_group" in r) == recipe.parts["test"].groups for r in records)


def test_a_run_of_texts(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "data").mkdir()
    (tmp_path / "bert").mkdir()
    data, model = lay_out_reviews(tmp_path / "data"), write_bert(tmp_path / "bert")
    assert main(["recipe", "reviews", "--data", str(data)]) == 0
    assert "texts by class" in capsys.readouterr().out
    assert train("reviews", data, "--data", str(data), model=model) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["optimizer"], config["text_column"]) == ("adamw", "text")
    with (tmp_path / "run" / "weights.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * (3 + 4)


def test_what_wins_over_a_recipe(waterbirds, tmp_path):
    file = tmp_path / "more.toml"
    file.write_text("epochs = 7\nlr = 0.5\n")
    options = {"val": "elsewhere", "model": "m"}
    config = configure("waterbirds", str(waterbirds), options, str(file), ["lr=0.25"])
    assert (config.epochs, config.lr, config.weight_decay) == (7, 0.25, 1e-4)
    assert (config.model, config.pretrained, config.val) == ("m", None, "elsewhere")
    assert config.real == str(waterbirds / "real")
    assert config.synthetic == (str(waterbirds / "synthetic"),)
    # a list is preferred to the folder beside it
    assert config.test == str(waterbirds / "test.csv")


def test_the_recipes_model_starts_from_its_weights(waterbirds):
    assert configure("waterbirds", str(waterbirds), {}, None, []).pretrained == str(
        waterbirds / "resnet50-small.pth"
    )
    options = {"pretrained": "mine.pth"}
    assert configure("waterbirds", str(waterbirds), options, None, []).pretrained == "mine.pth"
    (waterbirds / "resnet50-small.pth").unlink()
    with pytest.raises(ValueError, match="which is to hold ImageNet weights"):
        configure("waterbirds", str(waterbirds), {}, None, [])


def test_roles_without_a_folder(waterbirds, capsys):
    roles = {role: str(waterbirds / role) for role in COUNTS}
    words = [word for role, path in roles.items() for word in (f"--{role}", path)]
    assert train("waterbirds", waterbirds, *words) == 0
    options = {**roles, "synthetic": ["s"], "test": None, "model": "m"}
    config = configure("waterbirds", None, options, None, [])
    assert config.test is None
    capsys.readouterr()
    assert train("waterbirds", waterbirds, *words[:2]) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err and "--data FOLDER as `mts-fast recipe waterbirds` has it" in err
    for role in ("synthetic", "val"):
        assert f"no --{role}, which is to hold" in err
    assert "generated images" in err and "nothing was trained" in err


def test_what_a_folder_lacks_stops_the_run(waterbirds, capsys):
    (waterbirds / "val.csv").unlink()
    (waterbirds / "val").rename(waterbirds / "validation")
    assert train("waterbirds", waterbirds, "--data", str(waterbirds)) == 2
    err = capsys.readouterr().err
    assert "1 problem:" in err and "no val.csv and no folder val/" in err
    assert "put it there, or pass --val" in err
    assert not (waterbirds.parent / "run").exists()
    elsewhere = ("--val", str(waterbirds / "validation"))
    assert train("waterbirds", waterbirds, "--data", str(waterbirds), *elsewhere) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "watrebirds", "--data", "."], "did you mean 'waterbirds'?"),
        (["--recipe", "PACS", "--data", "."], "did you mean 'pacs-"),
        (["--recipe", "pacs", "--data", "."], "'pacs-art-cartoon' or 'pacs-art-photo' or"),
        (["--recipe", "published"], "--recipe must be one of celeba,"),
        (["--recipe", "celeba", "--data", "none"], "no folder 'none'; `mts-fast recipe celeba`"),
        (["--recipe", "celeba", "--data", ""], "--data must be the folder of the recipe's data"),
        (["--data", "."], "--data must be given with --recipe, got '.' alone"),
        (
            ["--recipe", "celeba", "--data", ".", "--set", "selectr_lr=1"],
            "'selectr_lr' is no option; the nearest is 'selector_lr'",
        ),
    ],
)
def test_mistakes_of_the_command_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
