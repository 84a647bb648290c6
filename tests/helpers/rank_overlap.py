"""What ranks of a pool run to see when sums of gradients set out."""

from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from rank_jobs import CLASSES, arguments, make_step, offline_step
from rank_settings import train_float32
from torch import nn

from mts_fast.distributed import buckets, ranks_of

BUCKET = 64  # bytes


def events(group, options):
    """What happens in a third call: "sum" for each, "last gradient" where a backward ends."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, options)
    step._ranks._in_band = not options.get("by_hosts")
    seen = []
    all_reduce = dist.all_reduce

    def watched(*args, **kwargs):
        seen.append("sum")
        return all_reduce(*args, **kwargs)

    with mock.patch.object(buckets, "BUCKET_BYTES", BUCKET):
        for call in range(2):
            step(**arguments(call, rank, size))
        handle = step.model[0].weight.register_hook(lambda g: seen.append("last gradient"))
        with mock.patch.object(dist, "all_reduce", watched):
            step(**arguments(2, rank, size))
        handle.remove()
    return seen


def after_other_sizes(group, bucket):
    """(parameters, whether sums were sent again) where a batch first comes in micro-batches in the
    third call, so that gradients are not final when the first of these ends."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {"micro_batch": 4})
    stopped = []
    stop = buckets.Overlap.stop

    def watched(overlap):
        stopped.append(overlap)
        stop(overlap)

    with (
        mock.patch.object(buckets, "BUCKET_BYTES", bucket),
        mock.patch.object(buckets.Overlap, "stop", watched),
    ):
        for call, rows in enumerate((4, 4, 6, 4, 6)):
            step(**arguments(call, rank, size, rows_each=rows))
    return [p.detach().clone() for p in step.model.parameters()], len(stopped)


def fails_in_the_backward(group, by_hosts):
    """(text of the error, whether nothing changed, parameters after two calls more) where one
    rank's backward raises when a part of its gradients is under way."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = make_step(group, {})
    step._ranks._in_band = not by_hosts

    def trouble(g):
        raise OSError("no gradient here")

    with mock.patch.object(buckets, "BUCKET_BYTES", BUCKET):
        for call in range(2):
            step(**arguments(call, rank, size))
        before = [p.detach().clone() for p in step.model.parameters()]
        handle = step.model[0].weight.register_hook(trouble) if rank == 1 else None
        text = "no error"
        try:
            step(**arguments(2, rank, size))
        except Exception as error:
            text = str(error)
        if handle is not None:
            handle.remove()
        now = zip(before, step.model.parameters(), strict=True)
        unchanged = all(torch.equal(a, b) for a, b in now)
        for call in range(2, 4):
            step(**arguments(call, rank, size))
    return text, unchanged, [p.detach().clone() for p in step.model.parameters()]


class Selected(torch.autograd.Function):
    """x W, whose backward has no gradient for W."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0].T, None


class Tokens(nn.Module):
    """A table with sparse gradients, and a parameter that gets none."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8, sparse=True)
        self.idle = nn.Parameter(torch.randn(8, 8))
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, tokens):
        x = Selected.apply(self.table(tokens).mean(1), self.idle)
        return self.head(self.body(x).tanh())


def sparse_gradients(group, bucket):
    """Parameters after four calls."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = Tokens().double()
    step = offline_step(model, group, engine="finite_difference")
    with mock.patch.object(buckets, "BUCKET_BYTES", bucket):
        for call in range(4):
            g = torch.Generator().manual_seed(10 * call + rank)
            tokens = torch.randint(9, (4, 5), generator=g)
            step(
                tokens,
                torch.randint(CLASSES, (4,), generator=g),
                features=torch.randn(4, 2, generator=g, dtype=torch.float64),
                val_inputs=tokens[:2],
                val_labels=torch.randint(CLASSES, (2,), generator=g),
            )
    return [p.detach().clone() for p in model.parameters()]


def computed_twice(group):
    """Sums of a gradient that a second backward has computed anew, when the first is under way."""
    rank = dist.get_rank(group)
    parameters = [nn.Parameter(torch.ones(4) * (i + 1)) for i in range(3)]
    ranks = ranks_of("test", nn.ParameterList(parameters), group)

    def gradients(factors):
        for factor in factors:
            loss = sum((p.square().sum() for p in parameters), torch.zeros(())) * factor
            computed = torch.autograd.grad(loss, parameters)
        return list(computed), []

    with mock.patch.object(buckets, "BUCKET_BYTES", 8):
        for factors in ((1.0,), (1.0,), (1.0, 2.0 + rank)):
            sums, _ = ranks.summed("test", parameters, 0, lambda f=factors: gradients(f))
    return sums


def compiled(group, bucket):
    """(parameters, how many graphs were compiled, whether sums set out early) of a compiled model,
    whose parameters get hooks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    announced = []
    announce = buckets.Sending.announce

    def watched(sending, i, tensor):
        announced.append(i)
        announce(sending, i, tensor)

    with (
        mock.patch.object(buckets, "BUCKET_BYTES", bucket),
        mock.patch.object(buckets.Sending, "announce", watched),
    ):
        state, *_ = train_float32(group, {"compiled": "model"}, (4, 4))
    return state, torch._dynamo.utils.counters["stats"]["unique_graphs"], bool(announced)
