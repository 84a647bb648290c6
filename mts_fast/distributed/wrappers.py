"""Data-parallel wrappers of a model, and the ranks that it is trained by."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from mts_fast._check import describe, fail
from mts_fast._isolation import all_modules
from mts_fast._sharding import SHARDED_MODULE, Sharding, is_a
from mts_fast.distributed.ranks import Alone, Ranks

if TYPE_CHECKING:
    import torch.distributed as dist

# by class name: importing the classes would import all of torch.distributed
DATA_PARALLEL = "DistributedDataParallel"
OLD_SHARDED = "FullyShardedDataParallel"
# of the step's group, once it is there
SINCE = "that of the step's construction"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, whose own forward and hooks a step does not need;
    the module itself where it is not wrapped."""
    return model.module if is_a(model, DATA_PARALLEL) else model  # type: ignore[return-value]


def _holds(model: nn.Module, *names: str) -> bool:
    """Whether it or a module in it is of a class of one of these names: asked of every class once,
    without the paths of modules, in every call."""
    classes = {cls for kind in set(map(type, all_modules([model]))) for cls in kind.__mro__}
    return any(cls.__name__ in names for cls in classes)


def check_wrappers(op: str, arg: str, model: nn.Module) -> None:
    """Refuse wrappers that a step cannot serve.

    Raises:
        RuntimeError: FullyShardedDataParallel, or a data-parallel wrapper inside the model.
    """
    if not _holds(model, OLD_SHARDED, DATA_PARALLEL):
        return
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
        RuntimeError: a wrapped model and another group than the wrapper's; a group that is not
            initialised; one that cannot exchange what is on the model's device.
    """
    group = _group(op, model, group, sharding)
    if group is None:
        return Alone()
    from mts_fast.distributed.group import Group

    device = next((p.device for p in model.parameters()), None)
    assert device is not None
    _check_backend(op, group, device.type)
    # exchanges of the model's own would come between early sums, on each rank in another place
    early_sums = not any(is_a(m, "SyncBatchNorm") for m in model.modules())
    in_band = device.type == "cpu"
    return Group(op, group, device, in_band=in_band, early_sums=early_sums, sharding=sharding)


def check_ranks(
    op: str, model: nn.Module, group: Any, ranks: Ranks, sharding: Sharding | None
) -> None:
    """Refuse a call where the processes are others than when the step was built.

    Raises:
        RuntimeError: wrappers that are not served; a model that was sharded since; a process group
            that was initialised, destroyed or replaced since.
    """
    check_wrappers(op, "model", model)
    if sharding is None and _holds(model, SHARDED_MODULE):
        hint = "call fully_shard first, then make the optimizer, then the step"
        got = "one that was sharded since"
        fail(RuntimeError, op, "model", "as when the step was built", got, hint)
    if ranks.size == 1 and group is None:
        return
    present = _group(op, model, group, sharding)
    if ranks.size == 1 and present is not None:
        hint = "build the step after torch.distributed.init_process_group"
        got = "a process group that is younger than the step"
        fail(RuntimeError, op, "process_group", SINCE, got, hint)
    if ranks.size > 1 and present is not ranks.group:
        hint = "build the step anew, after init_process_group, with the model as it is wrapped now"
        got = "another, or none" if present is None else "another"
        fail(RuntimeError, op, "process_group", SINCE, got, hint)


def _group(
    op: str, model: nn.Module, group: Any, sharding: Sharding | None
) -> dist.ProcessGroup | None:
    """The group of more than one rank; None for a process alone."""
    wrapper = getattr(model, "process_group", None) if is_a(model, DATA_PARALLEL) else None
    if sharding is not None:
        wrapper = sharding.group
    if group == "auto":
        group = wrapper if wrapper is not None else _default_group(op)
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
    if not _is_initialised(group):
        hint = "call torch.distributed.init_process_group, then wrap the model and build the step"
        fail(RuntimeError, op, "process_group", "initialised", "one that was destroyed", hint)
    return group if dist.get_world_size(group) > 1 else None


def _is_initialised(group: dist.ProcessGroup) -> bool:
    """Whether torch.distributed knows a group."""
    import torch.distributed as dist

    try:
        return dist.get_rank(group) >= 0
    except ValueError:  # the default group is gone, or this one
        return False


def _check_backend(op: str, group: dist.ProcessGroup, device: str) -> None:
    """Refuse a group without a backend for the model's device, or for the hosts."""
    import torch.distributed as dist

    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if device not in backends:
        hint = f"move the model to one of its devices, or make the group with one for {device!r}"
        expected = f"one that exchanges tensors on {device!r}"
        got = f"backends for {', '.join(backends)}"
        fail(RuntimeError, op, "process_group", expected, got, hint)
    if backends[device] != "gloo" and not dist.is_gloo_available():
        hint = "install a build of torch with gloo, which is what hosts exchange by"
        fail(RuntimeError, op, "process_group", "used with gloo beside it", "no gloo", hint)


def group_of(op: str, group: Any) -> dist.ProcessGroup | None:
    """The group of more than one rank that an argument means; None for this process alone."""
    return _group(op, nn.Identity(), group, None)


def _default_group(op: str) -> dist.ProcessGroup | None:
    """The group of all ranks, where it is initialised.

    Raises:
        RuntimeError: torchrun has started several processes, and it is not.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available():
        return None
    if dist.is_initialized():
        return dist.group.WORLD
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and dist.is_torchelastic_launched():
        hint = (
            "call torch.distributed.init_process_group first, or pass process_group=None to run"
            " each process by itself"
        )
        got = f"none in a process that torchrun has started as one of {size}"
        fail(RuntimeError, op, "process_group", "initialised", got, hint)
    return None
