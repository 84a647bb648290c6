"""Every Triton kernel compiles for the chips we name, in every configuration, without spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts"
# kernels of each group, so that a case that records no launch is noticed
KERNELS = {
    "cross_entropy": {"cross_entropy", "cross_entropy_backward", "scale"},
    "linear_cross_entropy": {
        f"linear_cross_entropy_{kernel}" for kernel in ("forward", "merge", "backward", "tangent")
    },
    "hypergradient_dot": {"hypergradient_dot", "sample_dot"},
    "norm_sample_gradients": {"layer_norm_sample_gradients", "group_norm_sample_gradients"},
    "virtual_update": {"sgd", "adam", "square_sum", "perturb"},
}


def run(*arguments):
    """Runs Python in another process, since triton may be interpreted in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("group", KERNELS)
def test_no_kernel_spills(group, tmp_path):
    report = tmp_path / "report.json"
    done = run(SCRIPTS / "check_triton.py", group, "--json", report)
    assert done.returncode == 0, done.stderr
    rows = json.loads(report.read_text())["rows"]
    for chip in (80, 90):
        assert {r["kernel"] for r in rows if r["capability"] == chip} == KERNELS[group]
    assert all(0 < r["registers"] <= 255 for r in rows)


def test_every_kernel_is_in_a_case():
    folder = ROOT / "mts_fast" / "backends" / "triton" / "kernels"
    sources = [p.read_text() for p in folder.glob("*.py")]
    written = {name for text in sources for name in re.findall(r"def (\w+)_kernel\(", text)}
    assert written == set().union(*KERNELS.values())


FAULTY = """
from check_triton import Compiled
for c in (
    Compiled("k", "c", 80, 255, 8, 0, 0),
    Compiled("k", "c", 80, 255, 0, 4, 0),
    Compiled("k", "c", 80, 255, 0, 0, 100 * 1024),
    Compiled("k", "c", 90, 255, 0, 0, 100 * 1024),
):
    print(c.faults())
"""


def test_the_gate_can_fail():
    """A stack, local memory, and more shared memory than compute capability 8.6 has."""
    done = run("-c", f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n{FAULTY}")
    assert done.stdout.splitlines() == [
        "['a stack of 8 bytes']",
        "['4 bytes of local memory']",
        "['102400 bytes of shared memory']",
        "[]",
    ]
