"""What ranks of a pool run where one of them fails, disagrees or dies."""

from contextlib import nullcontext
from unittest import mock

import torch
import torch.distributed as dist
from rank_jobs import arguments, make_step
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mts_fast._hosts import group_of_hosts
from mts_fast.distributed import GlobalBatchSampler
from mts_fast.hypergradient import Objective


def state(step):
    """Everything that a call may change, as bits."""
    entries = step.state_dict()
    tensors = [torch.get_rng_state()]
    for name in ("model", "selector"):
        tensors += [t.clone() for t in entries[name].values()]
    for name in ("optimizer", "selector_optimizer"):
        for s in entries[name]["state"].values():
            tensors += [torch.as_tensor(t).clone() for t in s.values() if t is not None]
    return tensors, entries["steps"]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


class Trouble(nn.Module):
    """Raises in a forward or backward when it is told to."""

    def __init__(self):
        super().__init__()
        self.in_forward = self.in_backward = False

    def forward(self, x):
        if self.in_forward:
            raise OSError("no forward here")
        if self.in_backward and x.requires_grad:
            x.register_hook(self._raise)
        return x

    def _raise(self, g):
        raise OSError("no backward here")


def fail_once(group, failure, options):
    """(exception, its text, whether nothing changed, losses of the calls after it)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, options)
    step._ranks._in_band = not options.get("by_hosts")
    step.model.insert(1, Trouble())
    trouble, here = step.model[1], rank == 1
    step(**arguments(0, rank, size))
    call = arguments(1, rank, size)
    if here:
        if failure == "labels out of range":
            call["labels"] = call["labels"] + 7
        if failure == "NaN in the features":
            call["features"] = call["features"] * torch.nan
        if failure == "NaN in the inputs":
            call["inputs"] = call["inputs"] * torch.nan
        if failure == "NaN in the validation batch":
            call["val_inputs"] = call["val_inputs"] * torch.nan
        if failure == "the wrong number of features":
            call["features"] = call["features"][:, :1]
        trouble.in_forward = failure == "the forward raises"
        trouble.in_backward = failure == "the backward raises"
        if failure == "the loss of the validation batch raises":
            step._validation = Objective(step.model, _no_loss)
        if failure == "a NaN in the loss of the validation batch":
            step._validation = Objective(step.model, _nan_loss)
    before = state(step)
    kind = text = ""
    try:
        step(**call)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    unchanged = same(before, state(step))
    trouble.in_forward = trouble.in_backward = False
    step._validation = step._objective
    losses = [float(step(**arguments(c, rank, size)).loss) for c in (1, 2)]
    return kind, text, unchanged, losses


def _nan_loss(output, labels):
    return output.sum(1) * torch.nan


def _no_loss(output, labels):
    raise OSError("no loss here")


class Awkward(nn.Module):
    """x w by a function that ghost cannot see into, where it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(8, 8, dtype=torch.float64) / 3) for _ in range(2)
        )
        self.awkward = False

    def forward(self, x):
        if self.awkward:
            return _Product.apply(_Product.apply(x, self.first), self.second)
        return x @ self.first @ self.second


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, b):
        x, weight = ctx.saved_tensors
        return b @ weight.T, x.T @ b


def refuse_on_one_rank(group):
    """The engines of three calls; in the second one rank's ghost cannot serve."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {"model": "mlp"})
    step.model.insert(1, Awkward())
    step.optimizer.add_param_group({"params": list(step.model[1].parameters())})
    engines = []
    for call in range(3):
        step.model[1].awkward = rank == 2 and call == 1
        engines.append(step(**arguments(call, rank, size)).engine)
    return engines


def disagree(group, difference):
    """The text of the error where rank 2 has something else."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    other = rank == 2
    options = {}
    if other and difference == "schedule":
        options["schedule"] = "reuse"
    if other and difference == "engine":
        options["engine"] = "double_backward"
    step = make_step(group, options)
    if other and difference == "steps":
        step.steps = 3
    if other and difference == "frozen":
        step.model[2].weight.requires_grad_(False)
    with torch.no_grad():
        if other and difference == "model":
            step.model[0].weight[0, 0] += 1e-12
        if other and difference == "selector":
            next(step.selector.parameters())[0, 0] += 1e-12
    call = arguments(0, rank, size, {"val_weights": other and difference == "weights"})
    try:
        step(**call)
    except Exception as error:
        return str(error)
    return "no error"


def step_before_the_group(group):
    """The text of the error of a step that was built before torch.distributed was initialised."""
    with mock.patch.object(dist, "is_initialized", lambda: False):
        step = make_step("auto", {})
    try:
        step(**arguments(0, dist.get_rank(group), dist.get_world_size(group)))
    except RuntimeError as error:
        return str(error)
    return "no error"


def other_group(group, how):
    """The text of the error of a step whose model or group is another than when it was built."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = dist.new_group(list(range(size)))
    step = make_step("auto" if how == "gone" else mine, {})
    step(**arguments(0, rank, size))
    if how == "sharded since":
        fully_shard(step.model, mesh=DeviceMesh.from_group(group, "cpu"))
    if how == "wrapped for another group":
        step.model = DistributedDataParallel(step.model, process_group=group)
    if how == "destroyed":
        dist.destroy_process_group(mine)
    gone = mock.patch.object(dist, "is_initialized", lambda: False)
    try:
        with gone if how == "gone" else nullcontext():
            step(**arguments(1, rank, size))
    except Exception as error:
        return str(error)
    return "no error"


def sum_of_hosts(group):
    """A sum over the hosts of all ranks, which are of one, two and three other groups."""
    hosts = group_of_hosts.__wrapped__(group)
    number = torch.ones(1)
    dist.all_reduce(number, group=hosts)
    return number.item()


def backend_without(group, what):
    """The text of the error of a group that cannot exchange what a step sends."""
    members = list(range(dist.get_world_size(group)))
    of_gpus = dist.new_group(members, backend="cuda:gloo")
    without_gloo = mock.patch.object(dist, "is_gloo_available", lambda: False)
    of_mpi = mock.patch.object(dist, "get_backend_config", lambda group: "cpu:mpi")
    try:
        if what == "tensors on the CPU":
            make_step(of_gpus, {})
        else:
            with without_gloo, of_mpi:
                make_step(group, {})
    except RuntimeError as error:
        return str(error)
    return "no error"


def sampler_before_the_group(group):
    """The text of the error of a sampler that was made before torch.distributed was initialised."""
    with mock.patch.object(dist, "is_initialized", lambda: False):
        sampler = GlobalBatchSampler(12, 6)
    try:
        next(iter(sampler))
    except RuntimeError as error:
        return str(error)
    return "no error"


def sampled_step(group):
    """The text of the error of a sampled step."""
    step = make_step(group, {})
    step.compute = 2
    try:
        step(**arguments(0, dist.get_rank(group), dist.get_world_size(group)))
    except RuntimeError as error:
        return str(error)
    return "no error"


def no_samples(group):
    """The text of the error where no rank has a sample."""
    step = make_step(group, {"online": False})
    call = arguments(0, dist.get_rank(group), dist.get_world_size(group))
    names = ("inputs", "labels", "features", "is_synthetic")
    try:
        step(**call | {name: call[name][:0] for name in names})
    except ValueError as error:
        return str(error)
    return "no error"


def train_with_dropout(group):
    """The selector after three calls, with dropout inside; ranks draw different numbers."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(rank)
    step = make_step(group, {"online": False})
    step.selector.mlp.insert(1, nn.Dropout(0.5))
    for call in range(3):
        step(**arguments(call, rank, size))
    return {k: v.clone() for k, v in step.selector.state_dict().items()}


def lose_a_rank(group, way):
    """Rank 1 goes in the second call."""
    import os
    import time

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {})
    step(**arguments(0, rank, size))
    if rank == 1:
        if way == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(20)
        return None
    step(**arguments(1, rank, size))
    return None
