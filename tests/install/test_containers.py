"""Dockerfiles, read and not built: what they copy exists, and the command runs without rights."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SECRET = re.compile(r"token|passw|secret|credential|_key\b", re.IGNORECASE)


def instructions(text):
    """(instruction, its arguments) without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def last_stage(listed):
    """The instructions from the last FROM on."""
    return listed[max(i for i, (name, _) in enumerate(listed) if name == "FROM") :]


def context():
    """The names that .dockerignore lets into a build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line[1:] for line in lines if line.startswith("!")}


def test_both_are_there():
    assert [path.stem for path in FILES] == ["cpu", "cuda"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_runs_without_rights(path):
    final = last_stage(instructions(path.read_text()))
    # a number, so that Kubernetes can tell that it is not root
    assert [int(user) > 0 for name, user in final if name == "USER"] == [True]
    after = [name for name, _ in final[[name for name, _ in final].index("USER") :]]
    assert "RUN" not in after
    assert [json.loads(words) for name, words in final if name == "ENTRYPOINT"] == [["mts-fast"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_are_compiled_in_a_stage_of_their_own(path):
    listed = instructions(path.read_text())
    final = last_stage(listed)
    building = listed[: len(listed) - len(final)]
    assert any("MTS_FAST_CPP=1" in words for name, words in building if name == "RUN")
    assert not any("g++" in words or "cmake" in words for _, words in final)
    assert [words for name, words in final if name == "COPY" and "--from=build" not in words] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_is_in_the_context(path):
    copies = [words.split() for name, words in instructions(path.read_text()) if name == "COPY"]
    for *sources, _ in copies:
        if not sources[0].startswith("--from="):
            assert set(sources) <= context() | {"."}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_secrets_and_no_index(path):
    text = path.read_text()
    assert "http" not in text
    settings = [w for name, w in instructions(text) if name in ("ARG", "ENV")]
    assert settings and not any(SECRET.search(words) for words in settings)
    assert all(words.endswith('=""') for words in settings if words.startswith("TORCH_INDEX"))


def test_the_context_is_what_a_build_needs():
    names = context()
    assert all((ROOT / name).exists() for name in names)
    assert {"CMakeLists.txt", "csrc", "mts_fast", "pyproject.toml", "setup.py"} <= names
    assert names.isdisjoint({".git", ".venv", "benchmarks", "tests"})
