"""What ranks run to save by torch.distributed.checkpoint, and to go on with as many or others."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_jobs import CLASSES
from rank_settings import sharded_arguments
from rank_sharded import Blocks, sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mts_fast
from mts_fast.distributed import GlobalBatchSampler
from mts_fast.distributed.checkpoint import StepLoadPlanner

EACH = 3  # calls between two checkpoints


class WithIdle(Blocks):
    """A parameter that is not used has no optimizer state."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(4, 2)


def make_step(group, kind, optimizer="adamw"):
    """`kind`: "plain", "ddp" or "sharded"; "plain" in one process."""
    torch.manual_seed(0)
    model = WithIdle().double()
    if group is not None and kind == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    if group is not None and kind == "sharded":
        model = sharded(model, group, {})
    torch.manual_seed(1)
    selector = mts_fast.Selector(6, CLASSES, hidden=(8,)).double()
    selector_optimizer = torch.optim.AdamW(selector.parameters(), lr=0.05)
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    }[optimizer]
    return mts_fast.MTSStep(
        model,
        make(model.parameters()),
        selector,
        selector_optimizer,
        online_momentum=0.9 if optimizer == "adamw" else None,
        feature_layer="head",
        # milestones are a Counter with numbers for keys
        selector_scheduler=torch.optim.lr_scheduler.MultiStepLR(selector_optimizer, [2, 5, 7]),
        process_group="auto" if group is not None and kind == "sharded" else group,
    )


def parts(step, rank, size):
    """What is saved together."""
    batches = GlobalBatchSampler(120, 12, rank=rank, ranks=size)
    return {"step": step, "batches": batches}


def run(group, kind, folder, start, sizes, optimizer="adamw", calls=EACH):
    """Load the checkpoint of call `start` (none of 0), take some calls, save; what is left."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    state = parts(make_step(group, kind, optimizer), rank, size)
    step, batches = state.values()
    if start:
        dcp.load(
            state,
            checkpoint_id=f"{folder}/{start}",
            planner=StepLoadPlanner(state),
            process_group=group,
        )
    order = iter(batches)
    numbers = []
    for call in range(start, start + calls):
        numbers.append(next(order))
        step(**sharded_arguments(call, sizes, rank))
    end = start + calls
    dcp.save(state, checkpoint_id=f"{folder}/{end}", process_group=group)
    return summary(step), numbers


def summary(step):
    """Parameters, optimizer state by parameter's name, selector, and counters; whole tensors."""
    names = {p: n for n, p in step._objective.model.named_parameters()}
    moments = {
        f"{names[p]}.{key}": value
        for p, entries in step.optimizer.state.items()
        for key, value in entries.items()
    }
    state = step.state_dict()
    return {
        "model": {n: whole(p) for p, n in names.items()},
        "optimizer": {name: whole(t) for name, t in moments.items()},
        "selector": {n: whole(t) for n, t in state["selector"].items()},
        "selector_optimizer": [
            {k: whole(t) for k, t in s.items()} for s in step.selector_optimizer.state.values()
        ],
        "rate": torch.tensor(step.selector_optimizer.param_groups[0]["lr"]),
        "online": {k: whole(t) for k, t in state["online"]["running"].items()},
        "steps": torch.tensor(step.steps),
    }


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def load_without_planner(group, kind, folder):
    """The texts of the errors of that load and of the call after it, and the number of steps after
    a load with the planner and one call."""
    step = make_step(group, kind)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    texts = []
    for act in (
        lambda: dcp.load({"step": step}, checkpoint_id=folder, process_group=group),
        lambda: step(**sharded_arguments(0, (12 // size,) * size, rank)),
    ):
        try:
            act()
        except Exception as error:
            texts.append(str(error))
    state = {"step": step}
    dcp.load(state, checkpoint_id=folder, planner=StepLoadPlanner(state), process_group=group)
    step(**sharded_arguments(EACH, (12 // size,) * size, rank))
    return texts, step.steps
