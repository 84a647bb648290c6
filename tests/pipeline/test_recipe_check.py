"""`mts-fast recipe`: the list, what a recipe expects, what is there, lists of originals."""

import csv

import pytest
from small_trees import COLOURS, colours_of, write_images

from mts_fast.cli.main import main
from mts_fast.pipeline.recipes import load_recipe, recipe_names
from mts_fast.pipeline.recipes.check import take_inventory

BIRDS = ("landbird", "waterbird")


def check(name, folder):
    """Exit status and recipe's inventory."""
    recipe = load_recipe("recipe", "NAME", name)
    return main(["recipe", name, "--data", str(folder)]), take_inventory(recipe, folder)


def birds(folder, *roles, classes=BIRDS):
    for seed, role in enumerate(roles):
        write_images(folder / role, colours_of(classes), 2, seed=seed)


def test_the_list(capsys):
    assert main(["recipe"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipe_says(name, capsys):
    recipe = load_recipe("recipe", "NAME", name)
    assert main(["recipe", name]) == 0
    out = capsys.readouterr().out
    for part in recipe.parts.values():
        assert f"{part.path}.csv" in out and part.holds in out and part.source in out
    assert all(f"  {key} = {value}\n" in out for key, value in recipe.options.items())
    assert all(note in out for note in recipe.notes) and "{" not in out


def test_an_empty_folder(tmp_path, capsys):
    status, inventory = check("waterbirds", tmp_path)
    out = capsys.readouterr().out
    assert status == 2 and not inventory.samples and len(inventory.findings.errors) == 5
    for role in ("real", "synthetic", "val", "test"):
        assert f"- {role}: no {role}.csv and no folder {role}/;" in out
    assert "weights: no resnet50*" in out and out.count("from: Waterbirds of Sagawa") == 3


def test_a_partial_folder(tmp_path, capsys):
    birds(tmp_path, "real", "synthetic")
    birds(tmp_path, "val", classes=BIRDS[:1])
    (tmp_path / "test" / "landbird").mkdir(parents=True)
    (tmp_path / "test.csv").write_text(
        "file,label,group\nreal/landbird/0.png,landbird,a\nreal/waterbird/0.png,waterbird,b\n"
        "real/landbird/1.png,landbird,a\n"
    )
    (tmp_path / "resnet50.safetensors").touch()
    status, inventory = check("waterbirds", tmp_path)
    assert status == 2
    (error,) = inventory.findings.errors
    assert error.startswith("val: no samples of 1 classes: 'waterbird'; validation images (split 1")
    assert "from: Waterbirds of Sagawa" in error
    assert inventory.findings.remarks == ["val has no groups: the worst group will not be reported"]
    assert inventory.groups() == {"test": {"a": 2, "b": 1}}
    lines = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["landbird", "2", "2", "2", "2"] in lines and ["waterbird", "2", "2", "0", "1"] in lines
    assert ["all", "4", "4", "2", "3"] in lines and ["a", "2"] in lines


def test_a_folder_of_other_classes(tmp_path):
    birds(tmp_path, "real", "synthetic", "val", "test", classes=("landbird", "waterbirds"))
    status, inventory = check("waterbirds", tmp_path)
    told = "\n".join(inventory.findings.errors)
    assert status == 2
    assert (
        "real: class 'waterbirds', which the recipe does not have; rename it ('waterbird'" in told
    )
    assert "real: no samples of 1 classes: 'waterbird'" in told


def test_classes_of_the_real_samples_where_a_recipe_names_none(tmp_path):
    for seed, role in enumerate(("real", "val", "test")):
        write_images(tmp_path / role, COLOURS, 1, seed=seed)
    write_images(tmp_path / "synthetic", colours_of(["red", "green"]), 1, seed=4)
    (tmp_path / "resnet50.pt").touch()
    status, inventory = check("texture", tmp_path)
    first, second = inventory.findings.errors
    assert status == 2 and first.startswith("synthetic: no samples of 1 classes: 'blue'")
    assert second.startswith("synthetic: class 'green', which the real samples do not have")


def test_lists_that_cannot_be_read(tmp_path):
    for role in ("real", "synthetic", "val"):
        (tmp_path / f"{role}.csv").write_text("text,label\nfine,good\ndull,bad\n")
    (tmp_path / "test.csv").write_text("review,label\nfine,good\n")
    status, inventory = check("reviews", tmp_path)
    (error,) = inventory.findings.errors
    assert status == 2 and "has no column text" in error
    # texts stand in lists: a folder is none
    (tmp_path / "test.csv").unlink()
    (tmp_path / "test").mkdir()
    assert check("reviews", tmp_path)[1].findings.errors[0].startswith("test: no test.csv;")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["celebA"], "NAME must be one of"),
        (["celebA"], "did you mean 'celeba'?"),
        (["celeba", "--data", "none"], "got no folder 'none'"),
        (["celeba", "--data", "file"], "--data must be the folder of the recipe's data"),
        (["--data", "."], "--data must be given with NAME"),
        (["celeba", "--prepare", "."], "--prepare must be given with --data"),
        (["reviews", "--data", "new", "--prepare", "."], "--prepare must be left out where no"),
        (["celeba", "--data", "new", "--prepare", "."], "with list_eval_partition.txt, got"),
        (["texture", "--data", "new", "--prepare", "."], "with train1.txt, got"),
        (["texture", "--data", "", "--prepare", "."], "--data must be the folder"),
        (["pacs-art-photo", "--data", "new", "--prepare", "."], "art_painting' does not exist"),
    ],
)
def test_mistakes_of_the_command_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["recipe", *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def rows_of(path):
    """Cells of a list, files as they are found from it."""
    with path.open(newline="") as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    return sorted([str((path.parent / name).resolve()), *rest] for name, *rest in rows)


def original_waterbirds(folder):
    paths = write_images(folder, {"001.Bird": (90, 90, 90)}, 12, seed=0)
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    expected = {0: [], 1: [], 2: []}
    for i, path in enumerate(paths):
        y, split, place = i % 2, i % 3, i // 6
        lines.append(f'{i},{path.relative_to(folder).as_posix()},{y},{split},{place},"/o/a, b.jpg"')
        group = f"{BIRDS[y]} on {('land', 'water')[place]}"
        expected[split].append([str(path.resolve()), BIRDS[y], *([group] if split else [])])
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return expected


def original_celeba(folder):
    images = folder / "img_align_celeba"
    write_images(folder, {"img_align_celeba": (90, 90, 90)}, 12, seed=0)
    for below in ("Anno", "Eval"):
        (folder / below).mkdir()
    attributes, partition = ["12", "Bald Blond_Hair Male"], []
    expected = {0: [], 1: [], 2: []}
    for i in range(12):
        blond, man, split = i % 2, i // 6, i % 3
        attributes.append(f"{i}.png -1  {'1' if blond else '-1'} {'1' if man else '-1'}")
        partition.append(f"{i}.png {split}")
        label = "blond" if blond else "not_blond"
        group = f"{label} {'man' if man else 'woman'}"
        row = [str((images / f"{i}.png").resolve()), label, *([group] if split else [])]
        expected[split].append(row)
    (folder / "Anno" / "list_attr_celeba.txt").write_text("\n".join(attributes) + "\n")
    (folder / "Eval" / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return expected


def original_dtd(folder):
    paths = write_images(folder / "images", COLOURS, 6, seed=0)
    (folder / "labels").mkdir()
    expected = {0: [], 1: [], 2: []}
    for i, path in enumerate(paths):
        expected[i % 3].append([str(path.resolve()), path.parent.name])
    for split, name in enumerate(("train1", "val1", "test1")):
        lines = [f"{label}/{path.rpartition('/')[2]}" for path, label in expected[split]]
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return expected


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("waterbirds", original_waterbirds),
        ("celeba", original_celeba),
        ("texture", original_dtd),
    ],
)
def test_lists_of_an_original(name, make, tmp_path, capsys):
    original = tmp_path / "original data"
    original.mkdir()
    expected = make(original)
    # a folder behind a link: paths in lists go up from where it really is
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    data = tmp_path / "link"
    words = ["recipe", name, "--data", str(data), "--prepare", str(original)]
    assert main(words) == 2
    out = capsys.readouterr().out
    assert "val.csv: 4 images" in out and "synthetic: no synthetic.csv" in out
    for split, role in enumerate(("real", "val", "test")):
        assert rows_of(data / f"{role}.csv") == sorted(expected[split])
    classes = load_recipe("recipe", "NAME", name).classes or tuple(COLOURS)
    write_images(data / "synthetic", colours_of(classes), 1, seed=1)
    (data / "resnet50.pth").touch()
    before = (data / "val.csv").read_bytes()
    assert main(words) == 0 and "wrote" not in capsys.readouterr().out
    assert (data / "val.csv").read_bytes() == before


def test_lists_of_pacs(tmp_path):
    recipe = load_recipe("recipe", "NAME", "pacs-art-sketch")
    for seed, domain in enumerate(("art_painting", "sketch")):
        write_images(tmp_path / domain, colours_of(recipe.classes), 10, seed=seed)
    words = ["recipe", recipe.name, "--data", str(tmp_path), "--prepare", str(tmp_path)]
    assert main(words) == 2
    # the domain of the real samples is there already
    assert not (tmp_path / "art_painting.csv").exists()
    val, test = (rows_of(tmp_path / role / "sketch.csv") for role in ("val", "test"))
    assert [label for _, label in sorted(val, key=lambda row: row[1])] == sorted(recipe.classes)
    images = {str(path.resolve()) for path in (tmp_path / "sketch").rglob("*.png")}
    assert {path for path, _ in val} | {path for path, _ in test} == images
    assert len(val) + len(test) == len(images) == 70
    inventory = take_inventory(recipe, tmp_path)
    assert len(inventory.findings.errors) == 2  # synthetic samples and weights
    assert len(inventory.samples["test"]) == 63


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("waterbirds", "metadata.csv", ",place,", ",where,", "line 2 (KeyError: 'place')"),
        ("waterbirds", "metadata.csv", "0,001.Bird/0.png,0,0", "0,001.Bird/0.png,0,7", "line 2"),
        ("waterbirds", "metadata.csv", "0,001.Bird/0.png,0,0", "0", "line 2"),
        ("celeba", "Anno/list_attr_celeba.txt", "3.png -1 ", "3.png ", "line 6"),
        ("celeba", "Anno/list_attr_celeba.txt", "Blond_Hair", "Blond", "line 3"),
        ("celeba", "Eval/list_eval_partition.txt", "4.png 1", "4.png", "line 5"),
        ("texture", "labels/val1.txt", "", None, "without samples for val"),
    ],
)
def test_an_original_of_other_content(name, file, old, new, said, tmp_path, capsys):
    original = tmp_path / "original"
    original.mkdir()
    makers = {"waterbirds": original_waterbirds, "celeba": original_celeba, "texture": original_dtd}
    makers[name](original)
    content = (original / file).read_text()
    assert old in content
    (original / file).write_text("" if new is None else content.replace(old, new, 1))
    data = tmp_path / "data"
    assert main(["recipe", name, "--data", str(data), "--prepare", str(original)]) == 2
    err = capsys.readouterr().err
    assert said in err and "mts-fast recipe: --prepare must be" in err
    assert not (data / "val.csv").exists()
