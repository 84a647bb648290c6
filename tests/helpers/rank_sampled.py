"""What ranks of a pool run in sampled steps."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from counted import counted
from rank_jobs import CLASSES, WIDTH, arguments, make_step, offline_step, train
from torch import nn

from mts_fast.training.sampled import part as sampled


def computed_here(group, options, sizes, calls=4):
    """How many samples a rank has computed in each call."""
    seen = []
    place = sampled.place

    def watched(*args, **kwargs):
        placed = place(*args, **kwargs)
        seen.append(len(placed.batch))
        return placed

    with mock.patch.object(sampled, "place", watched):
        train(group, options, sizes, (2,) * len(sizes), calls)
    return seen


class Pooled(nn.Module):
    """Of sequences of any length."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, CLASSES)

    def forward(self, tokens, scale):
        return self.head(self.embedding(tokens).mean(1).tanh() * scale)


def of_unequal_lengths(group, computed):
    """What is left of steps whose sequences have another length on each rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    model = Pooled().double()
    step = offline_step(model, group, compute=computed)
    for call in range(3):
        g = torch.Generator().manual_seed(10 * call + rank)
        scale = torch.tensor(0.9, dtype=torch.float64)
        tokens = torch.randint(9, (4, 3 + rank), generator=g)
        step(
            {"tokens": tokens, "scale": scale},
            torch.randint(CLASSES, (4,), generator=g),
            features=torch.randn(4, 2, generator=g, dtype=torch.float64),
            val_inputs={"tokens": tokens[:2], "scale": scale},
            val_labels=torch.randint(CLASSES, (2,), generator=g),
        )
    return model.state_dict(), step.selector.state_dict(), size


def draws(group, calls):
    """The numbers that each call draws, by a rank's own generators; and those left of them."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(rank)
    step = make_step(group, {"compute": 4})
    numbers = []
    draw = sampled.systematic_sample

    def watched(*args, **kwargs):
        indices = draw(*args, **kwargs)
        numbers.append(indices.tolist())
        return indices

    before = torch.get_rng_state()
    with mock.patch.object(sampled, "systematic_sample", watched):
        for call in range(calls):
            step(**arguments(call, rank, size))
    return numbers, torch.equal(before, torch.get_rng_state())


def resumed_draws(group):
    """Parameters after four calls with dropout in the selector, straight and from a state saved
    after two, by a step of its own."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ends, state = [], None
    for resumes in (False, True):
        torch.manual_seed(3 + rank)
        step = make_step(group, {"compute": 4})
        step.selector.mlp.insert(1, nn.Dropout(0.5))
        step.selector.mlp.train()
        torch.manual_seed(3 + rank)
        if resumes:
            step.load_state_dict(state)
        for call in range(2 if resumes else 0, 4):
            if call == 2 and not resumes:
                state = copy.deepcopy(step.state_dict())
            step(**arguments(call, rank, size))
        ends.append([p.detach().clone() for p in step.model.parameters()])
    return ends


def count_messages(group, options):
    """(calls, bytes) of a sampled step's messages by function, of all gradients, and of the last
    layer's."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, options)
    for call in range(4):
        step(**arguments(call, rank, size))
    with counted() as (calls, sizes):
        step(**arguments(4, rank, size))
    of = [p.numel() * p.element_size() for p in step.model.parameters()]
    return dict(calls), dict(sizes), sum(of), sum(of[-2:])


def disagree(group):
    """The text of the error of ranks that compute other numbers of samples."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {"compute": 2 + rank})
    try:
        step(**arguments(0, rank, size))
    except ValueError as error:
        return str(error)
    return "no error"


def other_inputs(group):
    """The text of the error of a rank without samples whose inputs have another structure."""
    rank = dist.get_rank(group)
    step = make_step(group, {"compute": 2, "online": False})
    call = arguments(0, 0, 1)
    if rank:
        call = {k: v[:0] for k, v in call.items()}
        call["inputs"] = (torch.zeros(0, WIDTH).double(), torch.zeros(0, 2))
    try:
        step(**call)
    except ValueError as error:
        return str(error)
    return "no error"


def sampled_against_exact(group, sizes):
    """Ends of trainings of a BatchNorm model: exact, and with all of the batch drawn."""
    ends = []
    for options in ({}, {"compute": sum(sizes)}):
        options = options | {"model": "batchnorm", "engine": "double_backward"}
        left = train(group, options, sizes, (2,) * len(sizes), 4)
        ends.append((left["model"], left["selector"]))
    return ends
