"""A CUDA graph's stand-in on the CPU: records the operators of a function, and replays them on the
memory that they were recorded with."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# a graph cannot hold what makes the host wait for a value
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"}


class Tape(TorchDispatchMode):
    """Recorded operators, with the tensors that they read and wrote.

    Python code of the recorded function does not run again: numbers are frozen, and tensors are the
    memory of the recording. As in a capture, nothing that exists is changed by recording.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.saved = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        arguments = func._schema.arguments
        values = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            # batch norm's schema does not say that it writes to its statistics
            if written or argument.name in ("running_mean", "running_var"):
                self._save(values.get(argument.name))
        # aliases: an operator such as squeeze_ may change the shape of a tensor afterwards
        held = pytree.tree_map_only(torch.Tensor, torch.ops.aten.alias.default, (args, kwargs))
        out = func(*args, **kwargs)
        self.calls.append((func, *held, [torch.ops.aten.alias.default(t) for t in tensors(out)]))
        return out

    def _save(self, value):
        """Keep what an operator is about to overwrite."""
        for t in value if isinstance(value, list | tuple) else [value]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.saved.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def restore(self):
        """Undo all writes."""
        for storage, before in self.saved.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        """Run all operators again."""
        for func, args, kwargs, out in self.calls:
            made = func(*args, **kwargs)
            for old, new in zip(out, tensors(made), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.data.copy_(new)


def tensors(value):
    """The tensors of an operator's result."""
    values = value if isinstance(value, list | tuple) else [value]
    return [t for t in values if isinstance(t, torch.Tensor)]


class TapeRecorder:
    """In place of `CudaRecorder`."""

    def __init__(self):
        self.recordings = self.replays = 0

    def check(self, arg, optimizer):
        """Accepts every optimizer."""

    def run(self, function, inputs):
        return function(*inputs)

    def record(self, function, inputs):
        tape = Tape()
        generators = torch.get_rng_state()
        try:
            with tape:
                function(*inputs)
        finally:
            tape.restore()
            torch.set_rng_state(generators)
        self.recordings += 1

        def replay():
            self.replays += 1
            tape.replay()

        return replay
