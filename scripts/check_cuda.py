"""Compiles every CUDA kernel for ARCHITECTURES and refuses those that spill registers.

`python scripts/check_cuda.py` prints registers and shared memory per kernel; exit status 1 where a
kernel needs a stack frame, spills, or uses more shared memory than SHARED_LIMIT.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90")
# bytes that a block may use without opting in to more
SHARED_LIMIT = 48 * 1024


@dataclass(frozen=True)
class Kernel:
    """ptxas's report on one kernel for one chip."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int

    def faults(self) -> list[str]:
        faults = []
        if self.stack:
            faults.append(f"a stack frame of {self.stack} bytes")
        if self.spills:
            faults.append(f"{self.spills} bytes of spills")
        if self.shared > SHARED_LIMIT:
            faults.append(f"{self.shared} bytes of shared memory")
        return faults


def compile_kernels(source: Path, architecture: str, nvcc: str) -> list[Kernel]:
    """The kernels of one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.cubin")
        command = [nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} for {architecture}:\n{done.stderr}")
    return parse(done.stderr, architecture)


def parse(report: str, architecture: str) -> list[Kernel]:
    """The kernels in the output of `ptxas -v`."""
    kernels = []
    for part in report.split("Compiling entry function '")[1:]:
        name = re.search(r"\d+([a-z_]+_kernel)I([a-z])E", part)
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", part)[1])
            for what in ("stack frame", "spill stores", "spill loads")
        )
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Kernel(
                f"{name[1]}<{ {'f': 'float', 'd': 'double'}[name[2]] }>" if name else part[:60],
                architecture,
                int(re.search(r"Used (\d+) registers", part)[1]),
                stack,
                stores + loads,
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def check(nvcc: str) -> list[Kernel]:
    """All kernels on all chips."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [k for s in sources for chip in ARCHITECTURES for k in compile_kernels(s, chip, nvcc)]


if __name__ == "__main__":
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise SystemExit("check_cuda: nvcc was not found")
    kernels = check(compiler)
    for k in kernels:
        print(f"{k.name:32} {k.architecture}  {k.registers:3} registers  {k.shared:6} B shared")
    faults = [f"{k.name} {k.architecture}: {', '.join(k.faults())}" for k in kernels if k.faults()]
    sys.exit("\n".join(faults) if faults else 0)
