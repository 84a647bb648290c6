"""What ranks of a pool run to see when sums of gradients set out."""

from unittest import mock

import torch
import torch.distributed as dist
from rank_jobs import arguments, make_step

from mts_fast.distributed import buckets

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
