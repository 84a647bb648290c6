"""Class folders: what is a class, what is a sample, and what is told about the rest."""

import os

import pytest

from mts_fast.pipeline.data import Findings
from mts_fast.pipeline.data.folders import read_folder


def tree(root, *files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def read(root, role="real"):
    findings = Findings()
    return read_folder(role, root, findings), findings


def test_the_first_level_is_the_class_at_any_depth(tmp_path):
    tree(tmp_path, "red/a.png", "red/camera 1/day/a.png", "007/b.JPG", "test/photo of a train.webp")
    samples, findings = read(tmp_path)
    assert samples.names == (
        "007/b.JPG",
        "red/a.png",
        "red/camera 1/day/a.png",
        "test/photo of a train.webp",
    )
    assert samples.labels == ("007", "red", "red", "test")
    assert not findings.errors and not findings.remarks


def test_what_the_system_hides_is_neither_class_nor_sample(tmp_path):
    tree(tmp_path, "red/a.png", "blue/b.png", "red/._a.png", "blue/Thumbs.db", "red/desktop.ini")
    tree(
        tmp_path, ".ipynb_checkpoints/a.png", "red/.cache/a.png", "__MACOSX/red/a.png", ".DS_Store"
    )
    samples, findings = read(tmp_path)
    assert samples.names == ("blue/b.png", "red/a.png") and not findings.remarks


def test_files_of_other_kinds_are_counted_and_named(tmp_path):
    tree(tmp_path, "red/a.png", "red/logo.svg", "red/more.svg", "red/notes.txt", "blue/b.png")
    _, findings = read(tmp_path)
    (remark,) = findings.remarks
    assert "2 .svg ('logo.svg', 'more.svg')" in remark and "1 .txt ('notes.txt')" in remark


def test_empty_classes_are_known(tmp_path):
    tree(tmp_path, "red/a.png", "green/notes.txt")
    samples, _ = read(tmp_path)
    assert samples.empty_classes == ("green",)


def test_forms_of_one_name_are_one_class(tmp_path):
    tree(tmp_path, "caf\u00e9/a.png", "cafe\u0301/b.png", "tea/c.png")
    samples, _ = read(tmp_path)
    assert set(samples.labels) == {"caf\u00e9", "tea"} and len(samples) == 3


def test_links_count_and_cycles_end(tmp_path):
    store = tree(tmp_path / "store", "0/a.png", "b.png")
    root = tree(tmp_path / "real", "green/c.png")
    (root / "red").symlink_to(store / "0", target_is_directory=True)
    (root / "green" / "b.png").symlink_to(store / "b.png")
    (root / "green" / "again").symlink_to(root / "green", target_is_directory=True)
    (root / "green" / "all").symlink_to(root, target_is_directory=True)
    (root / "green" / "lost.png").symlink_to(root / "nowhere")
    samples, findings = read(root)
    names = [name for name in samples.names if "/all/" not in name]
    assert names == ["green/b.png", "green/c.png", "red/a.png"] and not findings.errors
    assert len(samples) < 12


@pytest.mark.parametrize(
    ("role", "below"), [("real", "train"), ("val", "val"), ("synthetic", "train")]
)
def test_a_folder_of_splits_is_recognised(role, below, tmp_path):
    tree(tmp_path, "train/red/a.png", "train/blue/b.png", "val/red/c.png")
    samples, findings = read(tmp_path, role)
    assert samples is None
    assert f"pass '{tmp_path / below}'" in findings.errors[0] and "'train'" in findings.errors[0]


def test_classes_named_as_splits_are_classes(tmp_path):
    tree(tmp_path, "train/a.png", "test/b.png", "val/c.png")
    samples, findings = read(tmp_path)
    assert set(samples.labels) == {"train", "test", "val"} and not findings.errors


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text("x"), "is a file"),
        (lambda root: root.mkdir(), "has no class folders; fill it"),
        (
            lambda root: tree(root, "a.png", "b.png"),
            "put its 2 files into one folder for each class",
        ),
    ],
)
def test_what_is_no_folder_of_classes_is_told(make, said, tmp_path):
    root = tmp_path / "real"
    make(root)
    samples, findings = read(root)
    assert samples is None and said in findings.errors[0]


def test_odd_names_survive(tmp_path):
    odd = [
        "a, b.png",
        'quote".png',
        "line\nbreak.png",
        "-dash.png",
        "dots.in.name.png",
        " blank.png",
    ]
    tree(tmp_path, *(f"red/{name}" for name in odd), "blue/b.png")
    samples, _ = read(tmp_path)
    assert {name.removeprefix("red/") for name in samples.names} == {*odd, "blue/b.png"}
    assert all(os.path.isfile(path) for path in samples.contents)
