"""Checks the built documentation: links within it lead somewhere, every example shows a picture.

`python scripts/check_site.py [FOLDER]` prints the number of pictures of each example's page, and
fails with page and target where a link, a picture or a style sheet is not there.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parent.parent
# of an example's page: pictures that its code drew, not the theme's
DRAWN = "sphx_glr_"


class Page(HTMLParser):
    """The links, pictures and anchors of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.pictures: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        target = values.get("href") or values.get("src")
        if target is None:
            return
        self.targets.append(target)
        if tag == "img" and DRAWN in target:
            self.pictures.append(target)


def broken(pages: dict[Path, Page]) -> list[str]:
    """page: target, for every local target without a file or without its anchor."""
    faults = []
    for path, page in pages.items():
        for target in page.targets:
            if "://" in target or target.startswith(("mailto:", "data:", "//")):
                continue
            address, anchor = urldefrag(target)
            file = (path.parent / unquote(address.partition("?")[0])).resolve()
            file = file if address else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                faults.append(f"{path.name}: {target}")
            elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
                faults.append(f"{path.name}: {target} has no such anchor")
    return faults


def drawn(pages: dict[Path, Page], examples: list[str]) -> dict[str, int]:
    """Example -> how many pictures its page shows."""
    return {
        example: sum(len(page.pictures) for path, page in pages.items() if path.stem == example)
        for example in examples
    }


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    counts = drawn(pages, sorted(p.stem for p in (ROOT / "examples").glob("[!_]*.py")))
    print("pictures:", ", ".join(f"{example} {count}" for example, count in counts.items()))
    faults = broken(pages) + [f"{e}: no picture" for e, count in counts.items() if not count]
    if faults:
        sys.exit("\n".join(faults))
