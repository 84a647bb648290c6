"""What a step asks of a device: launches, and waits of the host, counted without a GPU."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operators without a kernel: allocations, metadata, and marks of the profiler
NO_KERNEL = {
    *("alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh"),
    *("new_empty", "new_empty_strided", "promote_types", "set_", "sym_size", "_unsafe_view"),
    *("_has_same_storage_numel", "_local_scalar_dense", "_record_function_enter_new"),
    *("_record_function_exit", "_reshape_alias"),
}
# tensors that one launch of a multi-tensor operator takes, and of a concatenation
FOREACH, CONCATENATED = 30, 128
# operators whose result or shape the host reads
WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2"),
    *("repeat_interleave.Tensor", "allclose"),
}


class Launches(TorchDispatchMode):
    """Counts operators that have a kernel, a multi-tensor one as many as torch's are for it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in NO_KERNEL:
            per_launch = FOREACH if name.startswith("_foreach") else CONCATENATED
            listed = args and isinstance(args[0], list | tuple)
            self.by_name[name] += math.ceil(len(args[0]) / per_launch) if listed else 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Where the host would wait for a device: reads of values, and shapes that depend on them.

    Reads of the tensors in `on_host` do not wait.
    """

    def __init__(self, on_host: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._on_host = {t.untyped_storage().data_ptr() for t in on_host}
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        overload = f"{name}.{func._overloadname}"
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        waits = by_mask or name in WAITING or overload in WAITING
        # states of generators are on the host, those of a GPU's, too
        waits = waits and not (name == "equal" and args[0].dtype == torch.uint8)
        if waits and args[0].untyped_storage().data_ptr() not in self._on_host:
            self.places.append(f"{overload} at {_place()}")
        return func(*args, **(kwargs or {}))


class HostData(TorchFunctionMode):
    """Where numbers of the host become tensors, whose copy to a device waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        makes = func in (torch.tensor, torch.as_tensor, torch.from_numpy)
        if makes and not isinstance(args[0], Tensor) and not _in_torchs_optimizer():
            self.places.append(f"{func.__name__} at {_place()}")
        return func(*args, **(kwargs or {}))


def _in_torchs_optimizer() -> bool:
    """Whether torch counts its steps, which it does on the host."""
    return any("/torch/optim/" in f.filename for f in traceback.extract_stack())


def _place() -> str:
    """The innermost line of the package."""
    frames = [f for f in traceback.extract_stack() if "/mts_fast/" in f.filename]
    frames = [f for f in frames if "/tests/" not in f.filename]
    if not frames:
        return "no line of mts_fast"
    return f"{frames[-1].filename.split('/mts_fast/')[-1]}:{frames[-1].lineno}"


@contextmanager
def taken_for_a_gpu(monkeypatch: Any) -> Iterator[None]:
    """CPU tensors say `is_cuda`, so that the library takes the way that it takes on a GPU: without
    C++ kernels, without a look at values, and with larger tensors side by side."""
    from mts_fast.backends import flat, registry
    from mts_fast.training import running, selector

    with monkeypatch.context() as m:
        m.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        m.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        m.setattr(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
        m.delitem(flat.LONGEST, "cpu")
        m.setattr(running, "PendingGap", _Unread)
        m.setattr(selector, "check_range", lambda *_: None)  # it asks for the CPU
        for op, by_backend in registry._implementations.items():
            rest = {name: x for name, x in by_backend.items() if name != "cpp"}
            m.setitem(registry._implementations, op, rest)
        yield


class _Unread:
    """In place of a gap that would be copied by an event of CUDA."""

    def __init__(self, *_: object) -> None: ...

    def report(self) -> None: ...
