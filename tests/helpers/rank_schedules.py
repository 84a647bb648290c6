"""What ranks run with schedulers of the classifier's optimizer and averages of its weights."""

import copy

import torch
import torch.distributed as dist
from rank_jobs import CLASSES
from rank_settings import sharded_arguments
from rank_sharded import Blocks, sharded
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mts_fast

SCHEDULERS = {
    # the momentum (of AdamW the first beta) goes up and down with the rate
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 0.8**k),
    "warm-up, then cosine": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
        ],
        milestones=[3],
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


class Shadow:
    """An average of weights as loops write it, outside of any module."""

    def __init__(self, parameters):
        self.values = [p.detach().clone() for p in parameters]

    def update(self, parameters):
        with torch.no_grad():
            for value, p in zip(self.values, parameters, strict=True):
                value.sub_(0.2 * (value - p))


def train_scheduled(group, kind, scheduler, optimizer, sizes, calls=10):
    """Parameters, both averages of them, the selector, the rates; evaluates both models halfway."""
    rank = 0 if group is None else dist.get_rank(group)
    torch.manual_seed(0)
    model = Blocks().double()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    if group is not None and kind == "ddp":
        model = DistributedDataParallel(model, process_group=group)
    if group is not None and kind == "sharded":
        model, average.module = sharded(model, group, {}), sharded(average.module, group, {})
    torch.manual_seed(1)
    selector = mts_fast.Selector(6, CLASSES, hidden=(8,)).double()
    selector_optimizer = torch.optim.AdamW(selector.parameters(), lr=0.05)
    step = mts_fast.MTSStep(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        selector,
        selector_optimizer,
        process_group="auto" if group is not None and kind == "sharded" else group,
    )
    schedule = SCHEDULERS[scheduler](step.optimizer)
    inside = step._objective.model
    shadow, rates = Shadow(inside.parameters()), []
    for call in range(calls):
        arguments = sharded_arguments(call, sizes, rank)
        step(**arguments)
        schedule.step()
        average.update_parameters(inside)
        shadow.update(inside.parameters())
        rates.append(step.optimizer.param_groups[0]["lr"])
        if call == calls // 2:  # between steps people evaluate both
            with torch.no_grad():
                average.module.eval()(arguments["inputs"])
                inside.eval()(arguments["inputs"])
            inside.train()
            if group is not None and kind == "sharded":
                average.module.reshard()  # torch leaves the root gathered after a forward
    lists = (inside.parameters(), average.module.parameters(), shadow.values)
    wholes = [[whole(p) for p in tensors] for tensors in lists]
    return *wholes, copy.deepcopy(selector.state_dict()), torch.tensor(rates)


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
