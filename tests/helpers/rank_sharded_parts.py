"""What ranks of a pool run with sharded models of unusual parts."""

import torch
import torch.distributed as dist
from rank_sharded import Blocks, arguments, sharded
from torch.nn import functional as F

import mts_fast


def trained(
    group,
    prepare=lambda model, rank: None,
    *,
    model=Blocks,
    sizes=None,
    change=lambda call: call,
    calls=3,
    **options,
):
    """Parameters after some calls; `prepare` changes the model before it is sharded, `change` the
    arguments of a call."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    torch.manual_seed(0)
    model = model().double()
    prepare(model, rank)
    if group is not None:
        model = sharded(model, group, {})
    torch.manual_seed(1)
    selector = mts_fast.Selector(2, 3, hidden=(8,)).double()
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=False,
        process_group="auto" if group is not None else None,
        **{"engine": "ghost", **options},
    )
    sizes = sizes or (12 // size,) * size
    if group is None:
        sizes = (sum(sizes),)
    for call in range(calls):
        step(**change(arguments(step, call, sizes, rank)))
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()
    ]


class Gated(Blocks):
    """The second block counts for samples whose first entry is positive."""

    def forward(self, x):
        gate = (x[:, :1] > 0).to(x.dtype)
        y = self.first(x)
        y = y + self.blocks[0](y)
        y = y + self.blocks[1](y) * gate
        return self.head(self.norm(y))


def closed_on_one_rank(group, sizes):
    """Where the block counts for no sample of the last rank; sizes are those of all ranks."""

    def gated(call):
        rows = list(call["inputs"].split(sizes)) if group is None else [call["inputs"]]
        if group is None or dist.get_rank(group) == len(sizes) - 1:
            rows[-1] = torch.cat([-rows[-1][:, :1].abs(), rows[-1][:, 1:]], 1)
        return call | {"inputs": torch.cat(rows)}

    return trained(group, model=Gated, sizes=sizes, change=gated, calls=6)


class Doubled(Blocks):
    """A layer whose weight is made of a parameter."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return F.linear(self.norm(x), self.head.weight * 2, self.head.bias)


def refused_after_the_forward(group, engine):
    """Parameters after three calls; the text of the error where there is one."""
    try:
        return trained(group, model=Doubled, engine=engine)
    except Exception as error:
        return str(error)


def frozen(group):
    return trained(group, lambda model, rank: model.first.requires_grad_(False))


def other_val_loss(group):
    def loss(output, labels):
        return F.cross_entropy(output, labels, reduction="none", label_smoothing=0.2)

    return trained(group, val_loss=loss)
