"""Compiles every Triton kernel for the chips we name, without a GPU, and refuses what would spill.

`python scripts/check_triton.py [GROUP ...]`: a table of registers and shared memory for each kernel
and configuration; exit status 1 where one uses a stack, local memory, or more shared memory than
its chips give. `--json FILE` keeps the table. Not in a process with TRITON_INTERPRET=1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import GROUPS, launches_of

from mts_fast.backends.triton.launch import COMPILE_OPTIONS, Launch

# what a block may have: sm_80 code also runs on 8.6 and 8.9, which have the least; Hopper
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
# what triton's launcher looks for in pointers and sizes
ALIGNMENT = 16


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of one kernel in one configuration on one chip."""

    kernel: str
    case: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int

    def faults(self) -> list[str]:
        found = []
        if self.stack:
            found.append(f"a stack of {self.stack} bytes")
        if self.local:
            found.append(f"{self.local} bytes of local memory")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        return found


def source_of(launch: Launch) -> ASTSource:
    """The specialization that a launch with these arguments compiles."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False)) | launch.options
    for i, name in enumerate(names):
        value = given[name]
        if name in launch.options or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % ALIGNMENT == 0:
                attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(case: str, launch: Launch, capability: int) -> Compiled:
    """Through ptxas."""
    options = {n: v for n, v in launch.options.items() if n in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source_of(launch), target=target, options=options | COMPILE_OPTIONS)
    usage = resource_usage(made.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in _USAGE)
    shared = int(made.metadata.shared)
    name = launch.kernel.__name__.removesuffix("_kernel")
    return Compiled(name, case, capability, registers, stack, local, shared)


_USAGE = ("REG", "STACK", "LOCAL")


def resource_usage(cubin: bytes) -> str:
    """cuobjdump's line about a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(group: str) -> list[Compiled]:
    """All kernels of a group in all configurations on all chips."""
    return [
        compile_launch(case, launch, capability)
        for case, launch in launches_of(group)
        for capability in SHARED_LIMIT
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = [c for group in asked.groups or GROUPS for c in check(group)]
    for c in found:
        where = f"{c.kernel:22} {c.case:42} sm_{c.capability}"
        print(f"{where}  {c.registers:3} registers  {c.shared:6} B shared")
    if asked.json:
        rows = ",\n  ".join(json.dumps(asdict(c)) for c in found)
        head = f'"command": "make resources", "triton": "{triton.__version__}"'
        asked.json.write_text(f'{{{head}, "rows": [\n  {rows}\n]}}\n')
    faults = [f"{c.kernel} {c.case} sm_{c.capability}: {f}" for c in found for f in c.faults()]
    sys.exit("\n".join(faults) if faults else 0)
