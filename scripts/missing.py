"""Prints the requirements of pyproject.toml that this environment lacks; torch and triton never.

    python scripts/missing.py            # of the extra dev, and of the build
    python scripts/missing.py --build    # what the build needs, whether it is there or not

Used by `make setup`, so that requirements are listed in pyproject.toml alone.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
NEVER = {"torch", "triton", "mts_fast"}


def name_of(requirement: str) -> str:
    """The distribution that a requirement is of."""
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def of_extra(project: dict, extra: str) -> list[str]:
    """Requirements of an extra, those of the extras that it names included."""
    listed: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        inner = re.match(r"mts_fast\[(.*)\]", requirement)
        listed += of_extra(project, inner[1]) if inner else [requirement]
    return listed


def is_missing(requirement: str) -> bool:
    """Whether no version of it is installed."""
    try:
        version(name_of(requirement))
    except PackageNotFoundError:
        return True
    return False


def main() -> None:
    """The command."""
    content = tomllib.loads(PROJECT.read_text())
    build = content["build-system"]["requires"]
    if "--build" in sys.argv:
        print(" ".join(build))
        return
    listed = [*build, *content["project"]["dependencies"], *of_extra(content["project"], "dev")]
    wanted = [r for r in dict.fromkeys(listed) if name_of(r) not in NEVER]
    # pip with nothing to install is an error; pip itself is always there
    print(" ".join(r for r in wanted if is_missing(r)) or "pip")


if __name__ == "__main__":
    main()
