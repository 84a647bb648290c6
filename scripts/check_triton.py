"""Compiles every Triton kernel without a GPU and refuses those that spill registers.

`python scripts/check_triton.py [GROUP ...]` prints registers and shared memory of each kernel in
each configuration; exit status 1 where one uses a stack, local memory, or more shared memory than
SHARED_LIMIT. `--chip 100` (repeatable) names other chips, `--json FILE` writes the table.
TRITON_INTERPRET=1 must not be set.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_cases import GROUPS, launches_of

from mts_fast.backends.triton.launch import COMPILE_OPTIONS, Launch

# bytes that a block may use, by compute capability; sm_80 code also runs on 8.6 and 8.9, which have
# the least
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# chips that are checked unless others are named
CHIPS = (80, 90)
DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
# triton's launcher specializes on pointers and sizes that are multiples of this
ALIGNMENT = 16


@dataclass(frozen=True)
class Compiled:
    """The assembler's report on one kernel in one configuration for one chip."""

    kernel: str
    case: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int

    def faults(self) -> list[str]:
        faults = []
        if self.stack:
            faults.append(f"a stack of {self.stack} bytes")
        if self.local:
            faults.append(f"{self.local} bytes of local memory")
        if self.shared > SHARED_LIMIT[self.capability]:
            faults.append(f"{self.shared} bytes of shared memory")
        return faults


def source_of(launch: Launch) -> ASTSource:
    """The specialization that a launch with these arguments compiles."""
    signature, constants, attributes = {}, {}, {}
    names = launch.kernel.arg_names
    arguments = dict(zip(names, launch.arguments, strict=False)) | launch.options
    for i, name in enumerate(names):
        value = arguments[name]
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
    """Compile one launch down to machine code, and read its resource usage."""
    options = {n: v for n, v in launch.options.items() if n in ("num_warps", "num_stages")}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(launch), target=target, options=options | COMPILE_OPTIONS)
    usage = resource_usage(compiled.asm["cubin"])
    fields = ("REG", "STACK", "LOCAL")
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in fields)
    shared = int(compiled.metadata.shared)
    name = launch.kernel.__name__.removesuffix("_kernel")
    return Compiled(name, case, capability, registers, stack, local, shared)


def resource_usage(cubin: bytes) -> str:
    """cuobjdump's line about a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(group: str, chips: Sequence[int]) -> list[Compiled]:
    """All kernels of a group in all configurations on these chips."""
    return [
        compile_launch(case, launch, capability)
        for case, launch in launches_of(group)
        for capability in chips
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chip", type=int, action="append", choices=SHARED_LIMIT)
    asked = parser.parse_args()
    kernels = [c for group in asked.groups or GROUPS for c in check(group, asked.chip or CHIPS)]
    for c in kernels:
        label = f"{c.kernel:22} {c.case:42} sm_{c.capability}"
        print(f"{label}  {c.registers:3} registers  {c.shared:6} B shared")
    if asked.json:
        rows = ",\n  ".join(json.dumps(asdict(c)) for c in kernels)
        head = f'"command": "make resources", "triton": "{triton.__version__}"'
        asked.json.write_text(f'{{{head}, "rows": [\n  {rows}\n]}}\n')
    faults = [f"{c.kernel} {c.case} sm_{c.capability}: {f}" for c in kernels for f in c.faults()]
    sys.exit("\n".join(faults) if faults else 0)
