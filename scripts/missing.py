"""Prints the requirements of pyproject.toml that this environment lacks; torch and triton never.

    python scripts/missing.py            # missing ones of the build, the package and the extra dev
    python scripts/missing.py --build    # all of the build, installed or not

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
    """The name of the distribution in a requirement."""
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def of_extra(project: dict, extra: str) -> list[str]:
    """Requirements of an extra, including those of the extras that it names."""
    listed: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        inner = re.match(r"mts_fast\[(.*)\]", requirement)
        listed += of_extra(project, inner[1]) if inner else [requirement]
    return listed


def is_missing(requirement: str) -> bool:
    """Whether no version of the distribution is installed."""
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
    # `pip install` without an argument is an error; pip itself is always installed
    print(" ".join(r for r in wanted if is_missing(r)) or "pip")


if __name__ == "__main__":
    main()
