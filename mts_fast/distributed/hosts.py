"""The hosts of the ranks of a group."""

from __future__ import annotations

import functools

import torch.distributed as dist


@functools.cache
def group_of_hosts(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The same ranks over gloo; every rank of the group calls it."""
    ranks = dist.get_process_group_ranks(group)
    timeout = getattr(getattr(group, "options", None), "_timeout", None)
    # by themselves ranks find each other only where each is of as many groups as the others
    part = len(ranks) < dist.get_world_size()
    return dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=part)
