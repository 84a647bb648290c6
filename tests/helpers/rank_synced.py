"""What ranks run with SyncBatchNorm, which torch has on GPUs alone."""

from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from rank_jobs import CLASSES, OPTIMIZERS, WIDTH, options_of_a_step
from rank_settings import sharded_arguments
from torch import nn

import mts_fast


class Sums(torch.autograd.Function):
    """Sums over ranks, forward and backward; as torch's function without further derivatives."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return summed(g, ctx.group), None


def summed(x, group):
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


class OnCPU(nn.SyncBatchNorm):
    """SyncBatchNorm of [B, C], written out; with statistics of all ranks in train mode."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ones = torch.ones_like(x[:, :1])
        n, total, squares = Sums.apply(
            torch.cat([ones, x, x * x], 1).sum(0), self.process_group
        ).split([1, x.shape[1], x.shape[1]])
        mean = total / n
        var = squares / n - mean * mean
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def synced_step(group, kind, options):
    torch.manual_seed(0)
    norm = kind(8) if group is None else kind(8, process_group=group)
    model = nn.Sequential(nn.Linear(WIDTH, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES)).double()
    torch.manual_seed(1)
    selector = mts_fast.Selector(2, CLASSES, hidden=(8,)).double()
    if options.get("selector"):
        selector.mlp.insert(1, nn.SyncBatchNorm(8, process_group=group).double())
    return mts_fast.MTSStep(
        model,
        OPTIMIZERS["sgd"](model.parameters()),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=False,
        process_group=group if not options.get("alone") else None,
        **options_of_a_step(options),
    )


def train_synced(group, options, sizes, calls=5):
    """(model, selector, dots, engine) after some calls; one process with plain BatchNorm."""
    rank = 0 if group is None else dist.get_rank(group)
    step = synced_step(group, nn.BatchNorm1d if group is None else OnCPU, options)
    dots = []
    with mock.patch("mts_fast.training.synced.on_cpu", lambda module, model: False):
        for call in range(calls):
            result = step(**sharded_arguments(call, sizes, rank))
            dots.append(result.dots)
    state = step.state_dict()
    return state["model"], state["selector"], dots, result.engine


CASES = {  # options of a step, sizes of the parts; torch's own layer is on the CPU
    "cpu": ({}, (6, 6)),
    "eval": ({}, (6, 6)),
    "empty": ({}, (0, 12)),
    "uneven": ({"micro_batch": 4}, (4, 8)),
    "alone": ({"alone": True}, (6, 6)),
    "selector": ({"selector": True}, (6, 6)),
    "forward_mode": ({"engine": "forward_mode"}, (6, 6)),
    "double_backward": ({"engine": "double_backward"}, (6, 6)),
    "compute": ({"compute": 4}, (6, 6)),
}


def refused(group, what):
    """The text of the error of a first call."""
    options, sizes = CASES[what]
    is_torchs = what in ("cpu", "eval")
    on_gpu = mock.patch("mts_fast.training.synced.on_cpu", lambda module, model: False)
    try:
        with nullcontext() if is_torchs else on_gpu:
            step = synced_step(group, nn.SyncBatchNorm if is_torchs else OnCPU, options)
            step.model[1].train(what != "eval")
            step(**sharded_arguments(0, sizes, dist.get_rank(group)))
    except Exception as error:
        return str(error)
    return "no error"
