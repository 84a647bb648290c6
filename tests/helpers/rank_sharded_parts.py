"""What ranks of a pool run with sharded models of unusual parts."""

import torch
import torch.distributed as dist
from rank_sharded import Blocks, arguments, sharded
from torch.nn import functional as F

import mts_fast


def trained(group, prepare=lambda model, rank: None, **options):
    """Parameters after three calls; `prepare` changes the model before it is sharded."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    torch.manual_seed(0)
    model = Blocks().double()
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
        engine="ghost",
        online_features=False,
        process_group="auto" if group is not None else None,
        **options,
    )
    sizes = (12 // size,) * size
    for call in range(3):
        step(**arguments(step, call, sizes, rank))
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for p in model.parameters()
    ]


def frozen(group):
    return trained(group, lambda model, rank: model.first.requires_grad_(False))


def other_val_loss(group):
    def loss(output, labels):
        return F.cross_entropy(output, labels, reduction="none", label_smoothing=0.2)

    return trained(group, val_loss=loss)
