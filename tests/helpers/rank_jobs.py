"""What ranks of a pool run: small trainings, whose results one process must give, too."""

import contextlib
import itertools
from unittest import mock

import torch
import torch.distributed as dist
from counted import counted
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mts_fast
from mts_fast.distributed import buckets
from mts_fast.sampling import systematic_sample
from mts_fast.training.sampled import part as sampled

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
    if kind == "no head":
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), Table(8, CLASSES)).double()
    if kind == "batchnorm":
        layers = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
        return nn.Sequential(*layers).double()
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


class Table(nn.Linear):
    """A last layer that is called twice: no control variate serves."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.square())


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
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-2),
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
    silent = options.get("silent")  # a first part that counts nothing
    if silent == "val_weights":
        val["val_weights"][: validation // 2] = 0.0
    if silent == "val_labels":
        val["val_labels"][: validation // 2] = -100
    if silent == "labels":  # of class_weight 0
        rows["labels"][: size // 2] = 0
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


# options of a job that are those of MTSStep
STEP_OPTIONS = (
    *("engine", "schedule", "micro_batch", "val_objective", "selector_every", "memory"),
    *("warmup_steps", "max_grad_norm", "track_gsnr", "online_momentum", "validation_mode"),
    *("accumulate", "compute", "scaler", "clip_virtual_step"),
)


def options_of_a_step(options):
    return {name: options[name] for name in STEP_OPTIONS if name in options}


def make_step(group, options):
    model = classifier(options.get("model", "mlp"))
    if options.get("wrapped") and group is not None:
        model = DistributedDataParallel(model, process_group=group, **options["wrapped"])
    torch.manual_seed(1)
    online = options.get("online", True)
    class_weight = torch.tensor([float(options.get("silent") != "labels"), 2.0, 0.5])
    selector = mts_fast.Selector(2 + 4 * online, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        OPTIMIZERS[options.get("optimizer", "sgd")](model.parameters()),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=online,
        process_group=group,
        class_weight=class_weight if options.get("class_weight") else None,
        **options_of_a_step(options),
    )


def offline_step(model, group, **options):
    """A step of a model of another task, with two features of its own."""
    selector = mts_fast.Selector(2, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=False,
        process_group=group,
        **options,
    )


def alike_draws():
    """Inside, sampled steps draw the same samples on one process and on many."""
    seeds = itertools.count()

    def draw(inclusion, k, strata):
        generator = torch.Generator().manual_seed(next(seeds))
        return systematic_sample(inclusion, k, strata=strata, generator=generator)

    return mock.patch.object(sampled, "systematic_sample", draw)


def turned(sizes):
    """Every rank is another one's size in the next call."""
    return sizes[1:] + sizes[:1]


def train(group, options, sizes, val_sizes, calls):
    """What is left after some calls; `sizes` are each rank's share of the batch."""
    rank = 0 if group is None else dist.get_rank(group)
    torch.manual_seed(5 + rank)  # ranks draw different numbers
    step = make_step(group, options)
    if options.get("by_hosts") and group is not None:
        step._ranks._in_band = False  # as on a GPU
    results = []
    stack = contextlib.ExitStack()
    if options.get("compute"):
        stack.enter_context(alike_draws())
    if "bucket_bytes" in options:
        stack.enter_context(mock.patch.object(buckets, "BUCKET_BYTES", options["bucket_bytes"]))
    with stack:
        _call(step, results, group, options, sizes, val_sizes, calls)
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


def _call(step, results, group, options, sizes, val_sizes, calls):
    rank = 0 if group is None else dist.get_rank(group)
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
            | {"sampling": None if result.sampling is None else result.sampling.read()}
        )


def arguments(call, rank, size, options=None, rows_each=4):
    options = options or {}
    rows, val = joined_batch(call, rows_each * size, 3 * size, options)
    return {k: part(v, (rows_each,) * size, rank) for k, v in rows.items()} | {
        k: part(v, (3,) * size, rank) for k, v in val.items()
    }


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


def nothing_counts(group, options):
    """The error of a call whose validation samples count nothing on any rank, and the steps."""
    step = make_step(group, options)
    step._ranks._in_band = not options["by_hosts"]
    call = arguments(0, dist.get_rank(group), dist.get_world_size(group), options)
    if "val_weights" in call:
        call["val_weights"] = torch.zeros_like(call["val_weights"])
    else:
        call["val_labels"] = torch.full_like(call["val_labels"], -100)
    try:
        step(**call)
    except ValueError as error:
        return str(error), step.steps
    return "no error", step.steps
