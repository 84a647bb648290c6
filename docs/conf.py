"""Sphinx builds the documentation site from the Markdown pages, the docstrings and the examples."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mts_fast  # noqa: E402

project = "mts_fast"
author = "the mts_fast developers"
copyright = "2026, the mts_fast developers"
release = version = mts_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/**/*.ipynb", "gallery/**/*.py", "sg_execution_times.rst"]
python_maximum_signature_line_length = 88
html_theme = "furo"
html_title = "mts_fast"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_custom_sections = [("Source", "notes_style")]

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"/.*\.py$",
    "ignore_pattern": r"(^|/)_",
    "download_all_examples": False,
    "abort_on_example_error": True,
    "show_memory": False,
    "remove_config_comments": True,
}

# characters that reStructuredText would read as markup in plain docstrings: |g|, [B, *shape]
_MARKUP = re.compile(r"(?<!\\)([|]|\*(?=\w+\]))")


def _escape_markup(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Escapes markup in plain-text docstrings, except in their doctests."""
    lines[:] = [
        line if line.lstrip().startswith((">>>", "...")) else _MARKUP.sub(r"\\\1", line)
        for line in lines
    ]


def setup(app):  # type: ignore[no-untyped-def]
    """Escapes docstrings before napoleon parses them."""
    app.connect("autodoc-process-docstring", _escape_markup, priority=400)
