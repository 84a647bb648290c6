"""Documents: blocks run or say why not, links have targets, examples run and are short."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rank_pool import SLOW

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))
# what Sphinx reads itself
DIRECTIVES = {"{eval-rst}", "{toctree}", "{image}"}
BLOCK = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>\S+)\n.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_LINES = 80
# of an example that adapts another library's trainer
MOST_LINES_OF_ADAPTERS = 150
ADAPTERS = ("hf_trainer", "lightning_module", "timm_loop", "accelerate_loop")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_that_are_not_run_say_why(document):
    """Python blocks are run by the conftest beside this repository's README."""
    for block in BLOCK.finditer(document.read_text()):
        if block["language"] == "python" or block["language"] in DIRECTIVES:
            continue
        assert re.match(r"<!-- not run: .{10,} -->", block["before"]), block[0][:80]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in slugs, target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


# of the rest, tests/examples runs those with a framework
ALWAYS_RUN = {"train_digits", "resume", "data_parallel"}


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=() if e.stem in ALWAYS_RUN else SLOW) for e in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_examples_run_and_draw(example, tmp_path):
    """Each example runs with small settings and shows a figure."""
    for package in ("transformers", "peft", "tensorboard", "accelerate", "lightning"):
        if f"{package} import" in example.read_text() or f"import {package}" in example.read_text():
            pytest.importorskip(package)
    most = MOST_LINES_OF_ADAPTERS if example.stem in ADAPTERS else MOST_LINES
    assert len(example.read_text().splitlines()) <= most
    run = (
        "import runpy, sys, matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt;"
        f"sys.path.insert(0, {str(example.parent)!r}); plt.show = lambda: plt.savefig('shown.png');"
        f"runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    environment = {**os.environ, "STEPS": "4", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "shown.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("example", "package"),
    [
        ("train_digits", "sklearn"),
        pytest.param("text_classifier", "transformers", marks=SLOW),
        pytest.param("lora", "peft", marks=SLOW),
        pytest.param("watch_weights", "tensorboard", marks=SLOW),
        pytest.param("hf_trainer", "transformers", marks=SLOW),
        pytest.param("lightning_module", "lightning", marks=SLOW),
        ("accelerate_loop", "accelerate"),
    ],
)
def test_examples_name_the_extra_that_they_lack(example, package):
    file = ROOT / "examples" / f"{example}.py"
    run = (
        f"import runpy, sys; sys.modules[{package!r}] = None;"
        f"sys.path.insert(0, {str(file.parent)!r}); runpy.run_path({str(file)!r})"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'mts_fast[examples]'" in done.stderr


def test_the_check_of_the_site_finds_what_is_broken(tmp_path):
    spec = importlib.util.spec_from_file_location("check_site", ROOT / "scripts" / "check_site.py")
    check_site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_site)
    (tmp_path / "a.html").write_text(
        '<h1 id="here"><a href="#here"></a><a href="b.html#there"></a><a href="none.html"></a>'
        '<a href="https://example.org/none"></a><img src="sphx_glr_a_001.png">'
    )
    (tmp_path / "b.html").write_text('<img src="logo.svg">')
    (tmp_path / "sphx_glr_a_001.png").touch()
    pages = {path: check_site.Page(path) for path in sorted(tmp_path.glob("*.html"))}
    assert check_site.broken(pages) == [
        "a.html: b.html#there has no such anchor",
        "a.html: none.html",
        "b.html: logo.svg",
    ]
    assert check_site.drawn(pages, ["a", "b"]) == {"a": 1, "b": 0}


def test_readme_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables" / "documents.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
