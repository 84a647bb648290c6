"""Whether the memory will be enough, predicted from one small batch before the run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import fail
from mts_fast._launcher import place
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.inputs import run_model

# of the batch that is measured: BatchNorm needs two
PROBE = 2
# a step of MTS holds the graphs of the training and the validation batch, and ghost the inputs and
# output gradients of layers, beside one plain graph
GRAPHS = 3
MEMORY_INFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
MIB = 2**20


def check_memory(model: nn.Module, probe: Any, config: Config) -> None:
    """Refuse a run on the CPU whose batches will not fit; the processes of a host share its memory.

    Args:
        probe: inputs of PROBE samples; `model` is left as it is.

    Raises:
        MemoryError: what is needed, what is there, and a micro-batch that fits.
    """
    here, free = place(), available_memory()
    if free is None:
        return
    available = free // here.local_ranks
    per_sample = GRAPHS * graph_bytes(model, probe) / PROBE
    of_rank = math.ceil(config.batch_size / here.ranks)
    size = min(config.micro_batch or of_rank, of_rank)
    if per_sample * size <= available:
        return
    fitting = max(1, int(available / per_sample))
    micro_batch = 1 << (fitting.bit_length() - 1)
    fail(
        MemoryError,
        "train",
        "memory",
        f"enough for {size} samples at a time (about {per_sample * size / MIB:,.0f} MiB)",
        f"{available / MIB:,.0f} MiB free",
        f"pass --set micro_batch={micro_batch}",
    )


def graph_bytes(model: nn.Module, inputs: Any) -> int:
    """Bytes that a forward keeps for its backward, parameters left out."""
    model = copy.deepcopy(model).cpu().train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address is not used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_model(model, inputs)
    return sum(sizes.values())


def available_memory() -> int | None:
    """Bytes that this process can still take; None where the system does not say."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable:")]
        available = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or one without a limit
        return available
    return min(available, max(0, limit - used))
