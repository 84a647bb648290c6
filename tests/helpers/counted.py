"""Counts what torch.distributed sends, by patching its functions."""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

# the bytes that a rank contributes to each
SENDERS = {
    "all_reduce": lambda tensor, **_: tensor,
    "all_gather": lambda parts, tensor, **_: tensor,
    "reduce_scatter_tensor": lambda output, tensor, **_: tensor,
    "all_to_all_single": lambda output, tensor, *_, **__: tensor,
    "all_gather_into_tensor": lambda output, tensor, **_: tensor,
}
OBJECTS = (
    "all_gather_object",
    "broadcast_object_list",
    "barrier",
    "broadcast",
    "monitored_barrier",
)


@contextmanager
def counted():
    """Inside, a Counter of calls and one of bytes, by function."""
    calls, sizes = Counter(), Counter()

    def counting(name, sent):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls[name] += 1
            if sent is not None:
                tensor: torch.Tensor = sent(*args, **kwargs)
                sizes[name] += tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(
        dist,
        **{name: counting(name, sent) for name, sent in SENDERS.items()},
        **{name: counting(name, None) for name in OBJECTS},
    ):
        yield calls, sizes
