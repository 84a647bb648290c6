"""The three make targets for a GPU machine: paths exist, time limits fit, few files return."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rank_pool import SLOW

ROOT = Path(__file__).parent.parent
# limit of a command on a GPU machine, less the time that make and pytest need to start
MOST_SECONDS = 540
# time for the build, which the first call runs
SETUP_SECONDS = 120


def commands(number):
    """The commands that a call would run, one per line, sub-makes included."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-n", f"gpu-call-{number}", "OUT=build/out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds(text):
    """Sum of the time limits of the commands."""
    return sum(int(n) for n in re.findall(r"timeout (?:-s INT )?-k 10 (\d+)", text))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_calls_end_in_time(number):
    text = commands(number)
    assert 0 < seconds(text) <= MOST_SECONDS - (SETUP_SECONDS if number == 1 else 0)


@SLOW
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_selected_exists(number):
    """Every pytest of a call collects something."""
    lines = re.findall(r"-m pytest ([^>|;]*)", commands(number))
    assert len(lines) == {1: 2, 2: 5}[number]
    for line in lines:
        words = shlex.split(line)
        arguments = [w for w in words if not w.startswith(("--benchmark-json", "--maxfail"))]
        if "-n" in arguments:
            place = arguments.index("-n")
            del arguments[place : place + 2]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        )
        # 5: nothing was collected
        assert done.returncode == 0, f"{line}: {done.stdout[-500:]}"


def test_few_files_come_back():
    """tests.txt and gpu_step.json; five records; waits, profile, sanitizer, tune: and a table."""
    text = "".join(map(commands, (1, 2, 3)))
    assert len(set(re.findall(r"condense\.py build/(\w+)\.json", text))) == 6
