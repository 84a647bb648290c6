"""The page of a run in a browser: silent, without requests, and usable by keyboard at any width."""

import csv
import os

import pytest
from browser import Browser, browser_path
from page_checks import problems
from small_bert import write_bert
from small_runs import COUNTS, make_tree, train
from small_trees import install_small_model

from mts_fast.cli.main import main

ALL = os.environ.get("MTS_FAST_TEST_ALL") == "1"
SCRIPT = "<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(2)>'
# one word that no line holds
LONG = "a_class_of_a_name_that_is_longer_than_a_phone_is_wide_" + "x" * 40

pytestmark = pytest.mark.skipif(
    browser_path() is None, reason="no chromium or google-chrome on PATH"
)


@pytest.fixture(scope="module")
def browser():
    with Browser(browser_path()) as browser:
        yield browser


def write_list(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def page_of(run):
    assert main(["report", str(run)]) == 0
    return run / "report.html"


def test_images_of_classes_and_groups_with_odd_names(tmp_path, monkeypatch, browser):
    install_small_model(monkeypatch)
    tree, lists = make_tree(tmp_path), []
    odd = {"red": SCRIPT, "blue": LONG}
    for role, count in COUNTS.items():
        rows = [
            [f"data/{role}/{folder}/{i}.png", label, IMAGE if i % 2 else "land"]
            for folder, label in odd.items()
            for i in range(count)
        ]
        if role == "synthetic":
            # labels that will be suspected, and a pair of identical samples
            rows[0][1], rows[-1][1] = LONG, SCRIPT
            name = tree / "data" / role / "blue" / f"{LONG} {IMAGE[2:]}.png"
            name.write_bytes((tree / "data" / "test" / "blue" / "0.png").read_bytes())
            rows.append([str(name.relative_to(tree)), LONG, "land"])
        lists += [f"--{role}", write_list(tree / f"{role}.csv", ["file", "label", "group"], rows)]
    assert train(tree, *lists, epochs=4, without=COUNTS) == 0
    assert problems(browser, page_of(tree / "run")) == []


@pytest.mark.skipif(not ALL, reason="takes 9 s; MTS_FAST_TEST_ALL=1 runs it")
def test_texts_that_look_like_markup(tmp_path, browser):
    pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    words = ["train", "--out", str(tmp_path / "run"), "--model", str(write_bert(tmp_path / "bert"))]
    words += ["--text-column", "text"]
    for role in COUNTS:
        rows = [
            [f"{role} {word} {i} {IMAGE} {SCRIPT} {LONG * i}\n\tindented", label]
            for label, word in ((SCRIPT, "fine"), ("bad", "dull"))
            for i in range(5)
        ]
        words += [f"--{role}", write_list(tmp_path / f"{role}.csv", ["text", "label"], rows)]
    for option in ("epochs=2", "dynamics_epochs=1", "batch_size=8", "refinements=0"):
        words += ["--set", option]
    assert main(words) == 0
    assert problems(browser, page_of(tmp_path / "run")) == []


def test_a_page_without_mistakes(tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(
        '<h1>One</h1><a href="#two">To two</a><h2 id="two">Two</h2><button>Press</button>'
        '<details><summary>More</summary><h3>Three</h3><a href="#two">Back</a></details>'
    )
    assert problems(browser, page) == []


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("<script>console.warn('odd')</script>", "console.warning: odd"),
        ("<script>setTimeout(() => { throw Error('late') }, 9)</script>", "exception: Error: late"),
        ("<script>confirm('sure?')</script>", "dialog: sure?"),
        ("<img alt=words src=none.png>", "/none.png"),
        ("<script src='http://127.0.0.1:9/x.js'></script>", "request: http://127.0.0.1:9/x.js"),
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' alt=' '>", "has no words"),
        ("<h3>deep</h3>", "heading 3 after 1: 'deep'"),
        ("<h1>again</h1>", "heading 1 after 1"),
        ("<button tabindex=-1>never</button>", "Tab does not reach <button"),
        ("<button style='outline: none'>unseen</button>", "focus cannot be seen: <button"),
        ("<span onclick='' tabindex=0>no keys</span>", "Space does nothing: <span"),
        ("<details><summary onkeydown='return false'>shut</summary></details>", "Enter does noth"),
        ("<a href='#none'>none</a>", "the link #none leads nowhere"),
        ("<div style='width: 2000px'>wide</div>", "360 pixels: sticks out: the page scrolls"),
        ("<div style='width: 400px'>wide</div>", "360 pixels: sticks out: <div"),
        ("<div style='overflow: auto'><p style='width: 2000px'>x</p></div>", "has no tabindex"),
        ("<p style='overflow: hidden; height: 9px'>half</p>", "cut off: <p"),
    ],
)
def test_mistakes_are_noticed(tmp_path, browser, mistake, said):
    page = tmp_path / "page.html"
    page.write_text(f"<h1>One</h1>{mistake}")
    # narrow enough for every one of them
    assert said in "\n".join(problems(browser, page, widths=(360,)))
