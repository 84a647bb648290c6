"""The hosts of the ranks of a group; importing it imports torch.distributed."""

from __future__ import annotations

import functools

import torch.distributed as dist


def hosts_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A group of the same ranks that tell each other of host memory: itself, or one beside it."""
    return group if "gloo" in dist.get_backend(group) else group_of_hosts(group)


@functools.cache
def group_of_hosts(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The same ranks over gloo; every rank of the group calls it."""
    ranks = dist.get_process_group_ranks(group)
    timeout = getattr(getattr(group, "options", None), "_timeout", None)
    # by themselves ranks find each other only where each is of as many groups as the others
    part = len(ranks) < dist.get_world_size()
    return dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=part)
