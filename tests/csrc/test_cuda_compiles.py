"""Every CUDA kernel compiles for the chips we name, without spills."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "scripts" / "check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_no_kernel_spills(gate):
    kernels = gate.check(NVCC)
    named = {(k.name, k.architecture) for k in kernels}
    assert named == {
        (f"{noun}_kernel<{scalar}>", chip)
        for noun in ("class_centroids", "label_agreement", "merge_rows")
        for scalar in ("float", "double")
        for chip in ("sm_80", "sm_90")
    }
    assert [k for k in kernels if k.faults()] == []
    # a block of 256 threads must fit twice into the 65536 registers of a multiprocessor
    assert all(k.registers <= 128 for k in kernels)


SPILLING = """
ptxas info    : Compiling entry function '_ZN8mts_fast4cuda12greedy_kernelIfEEvv' for 'sm_90'
ptxas info    : Function properties for _ZN8mts_fast4cuda12greedy_kernelIfEEvv
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 65536 bytes smem
"""


def test_the_gate_can_fail(gate):
    (kernel,) = gate.parse(SPILLING, "sm_90")
    assert kernel.name == "greedy_kernel<float>" and kernel.registers == 255
    assert kernel.faults() == [
        "a stack frame of 24 bytes",
        "24 bytes of spills",
        "65536 bytes of shared memory",
    ]
