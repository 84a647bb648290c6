"""Counts what torch.distributed sends, by patching its functions."""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

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


# part of an operator's name -> kind of message
KINDS = {"allgather": "gather", "all_gather": "gather", "reduce_scatter": "reduce"}


class SentBytes(TorchDispatchMode):
    """Inside, bytes that a rank contributes, by kind: also those of sharded modules and tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            for part, kind in KINDS.items():
                if part in func.__name__:
                    # c10d's operators take the output first
                    sent = args[1] if func.namespace == "c10d" else args[0]
                    tensors = sent if isinstance(sent, list) else [sent]
                    self.bytes[kind] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))
