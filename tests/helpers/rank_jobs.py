"""What ranks of a pool run: small trainings, whose results one process must give, too."""

from unittest import mock

import torch
import torch.distributed as dist
from counted import counted
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mts_fast
from mts_fast.hypergradient import Objective

CLASSES, WIDTH, VALIDATION = 3, 6, 9


def classifier(kind="mlp"):
    torch.manual_seed(0)
    if kind == "norm":  # BatchNorm whose statistics stay
        model = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
        )
        model[1].eval()
        return model.double()
    if kind == "large":
        layers = nn.Linear(WIDTH, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh()
        return nn.Sequential(*layers, nn.Linear(256, CLASSES)).double()
    if kind == "unused":
        return Idle().double()
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


class Idle(nn.Module):
    """With a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.idle, self.body = nn.Linear(2, 2), nn.Linear(WIDTH, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def part(tensor, sizes, rank):
    """A rank's rows of a joined tensor."""
    return None if tensor is None else tensor.split(list(sizes))[rank]


def joined_batch(call, size, validation, options):
    """The arguments of a call on all samples."""
    g = torch.Generator().manual_seed(100 + call)
    n = size + validation
    x = torch.randn(n, WIDTH, generator=g, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=g)
    rows = {
        "inputs": x[:size],
        "labels": y[:size],
        "features": torch.randn(size, 2, generator=g, dtype=torch.float64),
        "is_synthetic": torch.rand(size, generator=g) < 0.5,
    }
    val = {"val_inputs": x[size:], "val_labels": y[size:]}
    if options.get("val_weights"):
        val["val_weights"] = torch.rand(validation, generator=g, dtype=torch.float64) + 0.1
    if options.get("val_objective", "mean") != "mean":
        val["val_groups"] = torch.randint(4, (validation,), generator=g) * 7 - 3
    return rows, val


def selector_rows(call, size):
    g = torch.Generator().manual_seed(900 + call)
    return [
        torch.randn(size, WIDTH, generator=g, dtype=torch.float64),
        torch.randint(CLASSES, (size,), generator=g),
        torch.randn(size, 2, generator=g, dtype=torch.float64),
    ]


def make_step(group, options):
    model = classifier(options.get("model", "mlp"))
    if options.get("wrapped") and group is not None:
        model = DistributedDataParallel(model, process_group=group, **options["wrapped"])
    torch.manual_seed(1)
    online = options.get("online", True)
    selector = mts_fast.Selector(2 + 4 * online, CLASSES, hidden=(8,)).double()
    names = ("engine", "schedule", "micro_batch", "val_objective", "selector_every", "memory")
    more = ("warmup_steps", "max_grad_norm", "track_gsnr", "online_momentum", "validation_mode")
    return mts_fast.MTSStep(
        model,
        OPTIMIZERS[options.get("optimizer", "sgd")](model.parameters()),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=online,
        process_group=group,
        class_weight=torch.tensor([1.0, 2.0, 0.5]) if options.get("class_weight") else None,
        **{k: options[k] for k in names + more if k in options},
    )


def turned(sizes):
    """Every rank is another one's size in the next call."""
    return sizes[1:] + sizes[:1]


def train(group, options, sizes, val_sizes, calls):
    """What is left after some calls; `sizes` are each rank's share of the batch."""
    rank = 0 if group is None else dist.get_rank(group)
    torch.manual_seed(5 + rank)  # ranks draw different numbers
    step = make_step(group, options)
    results = []
    for call in range(calls):
        if group is not None:
            sizes, val_sizes = turned(sizes), turned(val_sizes)
        rows, val = joined_batch(call, sum(sizes), sum(val_sizes), options)
        second = None
        if options.get("selector_batch"):
            second = selector_rows(call, sum(sizes))
        if group is not None:
            rows = {k: part(v, sizes, rank) for k, v in rows.items()}
            val = {k: part(v, val_sizes, rank) for k, v in val.items()}
            second = second and [part(v, sizes, rank) for v in second]
        if second:
            second = mts_fast.SelectorBatch(second[0], second[1], features=second[2])
        result = step(**rows, **val, selector_batch=second)
        results.append(
            {
                name: getattr(result, name)
                for name in (
                    *("losses", "loss", "weights", "normalized_weights", "dots", "val_loss"),
                    *("self_check", "gsnr", "engine"),
                )
            }
            | {"statistics": torch.tensor(list(result.statistics.read().values()))}
        )
    model = step._objective.model
    return {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "selector": {k: v.clone() for k, v in step.selector.state_dict().items()},
        "momentum": [
            {k: v for k, v in s.items() if isinstance(v, torch.Tensor)}
            for s in step.optimizer.state.values()
        ],
        "results": results,
    }


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


def arguments(call, rank, size, options=None, rows_each=4):
    options = options or {}
    rows, val = joined_batch(call, rows_each * size, 3 * size, options)
    return {k: part(v, (rows_each,) * size, rank) for k, v in rows.items()} | {
        k: part(v, (3,) * size, rank) for k, v in val.items()
    }


def fail_once(group, failure):
    """(exception, its text, whether nothing changed, losses of the calls after it)."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {})
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


def sampled_step(group):
    """The text of the error of a sampled step."""
    step = make_step(group, {})
    step.compute = 2
    try:
        step(**arguments(0, dist.get_rank(group), dist.get_world_size(group)))
    except RuntimeError as error:
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


def count_messages(group, options):
    """(calls, bytes) of a step's messages by function, and the bytes of all gradients."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, options)
    for call in range(4):  # the first ones compare parameters and learn shapes
        step(**arguments(call, rank, size))
    with counted() as (calls, sizes):
        step(**arguments(4, rank, size))
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters())
    return dict(calls), dict(sizes), gradients


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
