"""Whether Triton kernels run here, for which tensors, and in which dtypes they accumulate.

`TRITON_INTERPRET=1`, set before mts_fast is imported, makes Triton's interpreter run them on the
CPU, for tests. Importing this module does not import triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._columns import any_requires_grad, dtypes_of
from mts_fast.backends.eligibility import several_devices

# earlier versions lack functions that the kernels use; block pointers, which later versions remove,
# are not used
OLDEST_TRITON = (3, 6)
# the oldest compute capability that the kernels are compiled for and checked on ahead of time
OLDEST_CAPABILITY = (8, 0)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels sum up in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def kernel_devices() -> tuple[str, ...]:
    """Device types that the kernels of this process serve."""
    # the interpreter reads the pointers of a pointer table directly: they must be to CPU memory
    return ("cpu",) if interpreted() else ("cuda",)


@functools.cache
def triton_reasons() -> tuple[str, ...]:
    """Why no Triton kernel can run in this process; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed; pip install 'mts_fast[triton]'",)
    version = _triton_version()
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or tuple(map(int, number.groups())) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (f"triton {version} is older than {oldest}; upgrade triton",)
    if interpreted() or torch.cuda.is_available():
        return ()
    return ("no CUDA device was found (TRITON_INTERPRET=1 runs kernels on the CPU, for tests)",)


def _triton_version() -> str:
    """From the package's metadata, or from the module: torch's nightly builds install triton under
    another package name."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module("triton").__version__)


@functools.cache
def _too_old(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return ""
    have, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    return f"its kernels need compute capability {need}, {device} has {have}"


def reasons_against_triton(
    tensors: Sequence[Tensor], *, floating: str = "tensors", backward: bool = True
) -> list[str]:
    """Why kernels cannot serve these tensors; empty where they can.

    `floating` names the tensors of a floating dtype in the reason; `backward` is whether the kernel
    has a backward.
    """
    reasons = list(triton_reasons())
    reasons += several_devices(tensors)
    if not reasons and tensors[0].device.type == "cuda" and (why := _too_old(tensors[0].device)):
        reasons.append(why)
    dtypes = {d for d in dtypes_of(tensors) if d.is_floating_point or d.is_complex}
    other = sorted(str(d).removeprefix("torch.") for d in dtypes - set(DTYPES))
    if other:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        reasons.append(f"its kernel takes {floating} of {names}, not {', '.join(other)}")
    if not backward and any_requires_grad(tensors):
        reasons.append("its kernel has no backward")
    return reasons
