"""Runs the Python blocks of README.md and docs/ as tests, each document's in its order.

They share names, so `make test` runs them in one process of their own.
"""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
collect_ignore = ["docs/conf.py", "docs/gallery", "setup.py", "build"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)$.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder_of_its_own(tmp_path, monkeypatch):
    """Run a block in a folder of its own, so that its files do not land in the checkout."""
    monkeypatch.chdir(tmp_path)


# a GPU machine without network may lack sybil
if importlib.util.find_spec("sybil"):
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=["README.md", "docs/*.md"],
        fixtures=["folder_of_its_own"],
    ).pytest()


def pytest_terminal_summary(terminalreporter):
    """How many blocks the documents have, and how many of them are not run."""
    texts = [document.read_text() for document in DOCUMENTS]
    blocks = [m for text in texts for m in FENCE.finditer(text)]
    python = sum(m[1] == "python" for m in blocks)
    skipped = sum(text.count("<!--- skip: next") for text in texts)
    others = len(blocks) - python
    terminalreporter.write_line(
        f"documents: {python - skipped} Python blocks run, {skipped + others} blocks not run"
    )
