"""What ranks of a pool run under settings of torch, and from saved states."""

import torch
import torch.distributed as dist
from rank_jobs import CLASSES, WIDTH, joined_batch, make_step, part
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mts_fast

VALIDATION = 8


def make_float32(group, options):
    """A step in float32: under autocast, in 16 bit, compiled or checkpointed."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(2)]
    if options.get("checkpointed"):
        blocks = [Checkpointed(b) for b in blocks]
    if options.get("compiled") == "blocks":
        blocks = [torch.compile(b, backend="aot_eager") for b in blocks]
    model = nn.Sequential(nn.Linear(WIDTH, 16), *blocks, nn.Linear(16, CLASSES))
    model = model.to(options.get("dtype", torch.float32))
    if options.get("compiled") == "model":
        model = torch.compile(model, backend="aot_eager")
    if group is not None:
        model = DistributedDataParallel(model, process_group=group)
    torch.manual_seed(1)
    selector = mts_fast.Selector(2, CLASSES, hidden=(8,))
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=False,
        process_group=group,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10) if options.get("scaler") else None,
    )


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def train_float32(group, options, sizes, calls=4):
    """(model, selector, dots of every call, engine) after some calls."""
    rank = 0 if group is None else dist.get_rank(group)
    step = make_float32(group, options)
    dots = []
    for call in range(calls):
        dtype = options.get("dtype", torch.float32)
        arguments = {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in sharded_arguments(call, sizes, rank).items()
        }
        arguments["features"] = arguments["features"].float()
        with torch.autocast("cpu", options.get("autocast"), enabled="autocast" in options):
            result = step(**arguments)
        dots.append(result.dots)
    state = step.state_dict()
    return state["model"], state["selector"], dots, result.engine


def resume(group, folder, sizes, saved_by):
    """A state that other ranks have saved, and what comes of it in three calls more."""
    rank = 0 if group is None else dist.get_rank(group)
    step = make_step(group, {"wrapped": {}})
    if saved_by is None:
        for call in range(3):
            step(**sharded_arguments(call, sizes, rank))
        if rank == 0:
            torch.save(step.state_dict(), f"{folder}/state.pt")
    else:
        step.load_state_dict(torch.load(f"{folder}/state.pt"))
    for call in range(3, 6):
        step(**sharded_arguments(call, sizes, rank))
    state = step.state_dict()
    return state["model"], state["selector"], state["steps"]


def sharded_arguments(call, sizes, rank):
    rows, val = joined_batch(call, sum(sizes), VALIDATION, {})
    return {k: part(v, sizes, rank) for k, v in rows.items()} | {
        k: part(v, (VALIDATION // len(sizes),) * len(sizes), rank) for k, v in val.items()
    }


def accumulate(group, sizes, calls):
    """What is left after steps of several calls each."""
    rank = 0 if group is None else dist.get_rank(group)
    step = make_step(group, {"online": False})
    step.accumulate = 1 if group is None else calls
    step._streams_calls = group is not None
    for number in range(4):
        pieces = [
            [sharded_arguments(10 * number + c, sizes, r) for c in range(calls)]
            for r in range(len(sizes))
        ]
        if group is not None:
            for call in pieces[rank]:
                step(**call)
            continue
        # each rank joins its own calls, and the ranks are joined then
        in_order = [call for of_rank in pieces for call in of_rank]
        step(**{k: torch.cat([call[k] for call in in_order]) for k in in_order[0]})
    state = step.state_dict()
    return state["model"], state["selector"], state["steps"]
