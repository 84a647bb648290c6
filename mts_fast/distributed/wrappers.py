"""Data-parallel wrappers of a model, and the ranks that it is trained by."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from mts_fast._check import describe, fail
from mts_fast._sharding import Sharding, is_a
from mts_fast.distributed.ranks import Alone, Ranks

if TYPE_CHECKING:
    import torch.distributed as dist

# by class name: importing the classes would import all of torch.distributed
DATA_PARALLEL = "DistributedDataParallel"
OLD_SHARDED = "FullyShardedDataParallel"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, whose own forward and hooks a step does not need;
    the module itself where it is not wrapped."""
    return model.module if is_a(model, DATA_PARALLEL) else model  # type: ignore[return-value]


def check_wrappers(op: str, arg: str, model: nn.Module) -> None:
    """Refuse wrappers that a step cannot serve.

    Raises:
        RuntimeError: FullyShardedDataParallel, or a data-parallel wrapper inside the model.
    """
    for path, module in model.named_modules():
        where = f" at {path!r}" if path else ""
        if is_a(module, OLD_SHARDED):
            hint = "call torch.distributed.fsdp.fully_shard(model) in its place"
            fail(RuntimeError, op, arg, "sharded by fully_shard", f"{OLD_SHARDED}{where}", hint)
        if path and is_a(module, DATA_PARALLEL):
            hint = "wrap all of it, compiled or not: DistributedDataParallel(torch.compile(model))"
            expected = "free of data-parallel wrappers inside"
            fail(RuntimeError, op, arg, expected, f"{DATA_PARALLEL}{where}", hint)


def ranks_of(op: str, model: nn.Module, group: Any, sharding: Sharding | None = None) -> Ranks:
    """The ranks that train a model.

    Args:
        op: what errors name.
        model: as the user has it, wrapped or not.
        sharding: of that model.
        group: "auto": the wrapper's group, else the default one where it is initialised, else
            this process alone; None: this process alone; or a process group.

    Raises:
        TypeError, ValueError: no process group; one that this process is not of.
        RuntimeError: a wrapped model and another group than the wrapper's.
    """
    group = _group(op, model, group, sharding)
    if group is None:
        return Alone()
    from mts_fast.distributed.group import Group

    device = next((p.device for p in model.parameters()), None)
    assert device is not None
    return Group(op, group, device, in_band=device.type == "cpu", sharding=sharding)


def check_ranks(op: str, model: nn.Module, group: Any, ranks: Ranks) -> None:
    """Refuse a call where the processes are others than when the step was built.

    Raises:
        RuntimeError: wrappers that are not served, or a process group that was initialised since.
    """
    check_wrappers(op, "model", model)
    if ranks.size == 1 and group is not None and _group(op, model, group, None) is not None:
        hint = "build the step after torch.distributed.init_process_group"
        got = "a process group that is younger than the step"
        fail(RuntimeError, op, "process_group", "that of the step's construction", got, hint)


def _group(
    op: str, model: nn.Module, group: Any, sharding: Sharding | None
) -> dist.ProcessGroup | None:
    """The group of more than one rank; None for a process alone."""
    wrapper = getattr(model, "process_group", None) if is_a(model, DATA_PARALLEL) else None
    if sharding is not None:
        wrapper = sharding.group
    if group == "auto":
        group = wrapper if wrapper is not None else _default_group()
    elif group is None and wrapper is not None:
        hint = "leave process_group= out, or pass the module inside"
        fail(RuntimeError, op, "process_group", "that of the wrapped model", "None", hint)
    if group is None:
        return None
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        hint = "pass what torch.distributed.new_group returns, None, or leave it out"
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            fail(ValueError, op, "process_group", "one of this rank's", "another's", hint)
        fail(TypeError, op, "process_group", "a process group", describe(group), hint)
    if wrapper is not None and wrapper is not group:
        hint = "leave process_group= out"
        fail(RuntimeError, op, "process_group", "that of the wrapped model", "another", hint)
    return group if dist.get_world_size(group) > 1 else None


def group_of(op: str, group: Any) -> dist.ProcessGroup | None:
    """The group of more than one rank that an argument means; None for this process alone."""
    return _group(op, nn.Identity(), group, None)


def _default_group() -> dist.ProcessGroup | None:
    """The group of all ranks, where it is initialised."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD
