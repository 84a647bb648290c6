"""Runs modules without side effects: buffers, modes, parameters, generators are restored bitwise.

Copies of parameters and buffers go through `.data`: autograd's version counters do not move, so a
graph recorded before stays valid afterwards.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from operator import attrgetter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._columns import are_same
from mts_fast._multi_tensor import SavedValues, overwrite

_training = attrgetter("training")


class World:
    """The modules that a call may run: their buffers and modes, and where their generators are.

    The list of modules is made once, and anew by `refresh` where a module was added or replaced.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self.roots = roots
        # parameters that a forward writes to: tables with max_norm, and others once seen
        self.written: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self.refresh()

    def refresh(self) -> None:
        """Look for modules that were added or replaced, or moved to another device."""
        children = children_of(self.modules)
        if not self.modules or not are_same(children, self._children):
            self.modules = all_modules(self.roots)
            self._children = children_of(self.modules)
            kinds = (nn.Embedding, nn.EmbeddingBag)
            self._tables = [m for m in self.modules if isinstance(m, kinds)]
        self.devices = {t.device for t in (*self.parameters(), *self.buffers()) if t.is_cuda}
        # tables whose gradient is divided by how often a row occurs
        self.frequency_tables = [m for m in self._tables if m.scale_grad_by_freq]
        self.note_written(m.weight for m in self._tables if m.max_norm is not None)

    def note_written(self, parameters: Iterable[Tensor]) -> None:
        """Treat these parameters as state of a forward, like buffers."""
        self.written = list({id(p): p for p in (*self.written, *parameters)}.values())

    def parameters(self) -> list[Tensor]:
        """All parameters."""
        entries = itertools.chain.from_iterable(m._parameters.values() for m in self.modules)
        return [p for p in entries if p is not None]

    def modes(self) -> tuple[bool, ...]:
        """Which modules are in train mode."""
        return tuple(map(_training, self.modules))

    def buffers(self) -> list[Tensor]:
        """All buffers."""
        entries = itertools.chain.from_iterable(m._buffers.values() for m in self.modules)
        return [b for b in entries if b is not None]


def children_of(modules: Iterable[nn.Module]) -> list[nn.Module | None]:
    """What modules hold as modules, in order; None where a name has none."""
    return list(itertools.chain.from_iterable(m._modules.values() for m in modules))


def all_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """Every module once, as `modules()` lists them, without the names that it makes."""
    modules: dict[int, nn.Module] = {}
    todo = [*reversed(roots)]
    while todo:
        module = todo.pop()
        if id(module) not in modules:
            modules[id(module)] = module
            if module._modules:
                todo += [m for m in reversed(module._modules.values()) if m is not None]
    return list(modules.values())


def world_of(modules: nn.Module | World) -> World:
    """A World as it is; a module wrapped in a World."""
    return modules if isinstance(modules, World) else World(modules)


_without_device_generators: ContextVar[bool] = ContextVar("mts_fast_no_generators", default=False)


@contextmanager
def without_device_generators() -> Iterator[None]:
    """Inside, generators of CUDA devices are neither read nor set back: in the capture of a graph
    torch refuses both."""
    token = _without_device_generators.set(True)
    try:
        yield
    finally:
        _without_device_generators.reset(token)


@dataclass(frozen=True, eq=False)
class RngState:
    """The generators that a forward may draw from: torch's of the CPU and of CUDA devices, numpy's
    global one and Python's. A torch.Generator or numpy Generator of the model's own is not seen."""

    cpu: Tensor
    cuda: dict[torch.device, Tensor]
    python: Any
    numpy: Any  # None where numpy's generator was never imported

    @classmethod
    def capture(cls, where: Iterable[Tensor] | World) -> RngState:
        """Read the default generators of the CPU and of every CUDA device of a world or tensors."""
        if _without_device_generators.get():
            devices = set()
        elif isinstance(where, World):
            devices = where.devices
        else:
            devices = {t.device for t in where if t.is_cuda}
        numpy_random = sys.modules.get("numpy.random")
        return cls(
            torch.get_rng_state(),
            {d: torch.cuda.get_rng_state(d) for d in devices},
            random.getstate(),
            None if numpy_random is None else numpy_random.get_state(),
        )

    def equals(self, other: RngState) -> bool:
        """Whether no generator moved in between."""
        return (
            torch.equal(self.cpu, other.cpu)
            and all(torch.equal(state, other.cuda[d]) for d, state in self.cuda.items())
            and self.python == other.python
            and _same_numpy(self.numpy, other.numpy)
        )

    def moved_since(self, before: RngState) -> tuple[bool, bool]:
        """Whether a generator of the host moved in between, and whether one of a device did."""
        host = RngState(before.cpu, {}, before.python, before.numpy)
        devices = (torch.equal(state, before.cuda[d]) for d, state in self.cuda.items())
        return not host.equals(self), not all(devices)

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy.random"].set_state(self.numpy)


def _same_numpy(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a[0] == b[0] and (a[1] == b[1]).all() and a[2:] == b[2:]


def restore_mapping(present: dict[str, Any], before: dict[str, Any]) -> None:
    """Make a mapping hold the same objects under the same names as before."""
    if len(present) != len(before) or any(present.get(n, 0) is not x for n, x in before.items()):
        present.clear()
        present.update(before)


class SavedBuffers:
    """Every buffer by module and name, with its value: one that a forward replaced, added or
    removed is put back, too; and parameters that a forward writes to."""

    def __init__(self, world: World) -> None:
        self._names = [(module, dict(module._buffers)) for module in world.modules]
        tensors = {id(b): b for _, names in self._names for b in names.values() if b is not None}
        tensors |= {id(p): p for p in world.written}
        present = [b for b in tensors.values() if not nn.parameter.is_lazy(b)]
        self._present = present
        self._saved = SavedValues(present)
        self._counted = tuple(b for b in present if not b.is_inference())
        self._versions = tuple(b._version for b in self._counted)

    def restore(self) -> None:
        """Put names and values back."""
        for module, names in self._names:
            restore_mapping(module._buffers, names)
        values = self._saved.values()
        for buffer, before in zip(self._present, values, strict=True):
            if buffer.shape != before.shape:
                buffer.data = torch.empty_like(before)
        overwrite(self._present, values)
        # the values are again those that a graph recorded before has saved
        torch._C._autograd._unsafe_set_version_counter(self._counted, self._versions)


class Restoring:
    """Context manager: `begin` inside, `restore` on the way out, whatever happens.

    Until `restore` is done it is listed as open, so that `restore_open` can finish it after an
    exception at an odd moment (Ctrl-C between two lines). `restore` must be repeatable.
    """

    def __init__(
        self, restore: Callable[[], None], begin: Callable[[], object] | None = None
    ) -> None:
        self._restore = restore
        self._begin = begin

    def __enter__(self) -> None:
        _open_here().append(self)
        if self._begin is not None:
            try:
                self._begin()
            except BaseException:
                self._close()
                raise

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        run_to_completion(self._restore)
        stack = _open_here()
        if self in stack:
            stack.remove(self)


class _Open(threading.local):
    def __init__(self) -> None:
        self.stack: list[Restoring] = []


_open = _Open()


def _open_here() -> list[Restoring]:
    return _open.stack


def open_count() -> int:
    """How many `Restoring`s of this thread are open."""
    return len(_open.stack)


def restore_open(since: int) -> None:
    """Restore, last first, all that are open beyond the first `since` ones."""
    stack = _open.stack
    while len(stack) > since:
        stack[-1]._restore()
        stack.pop()


def run_to_completion(restore: Callable[[], None]) -> None:
    """Run a repeatable clean-up to its end; one that is interrupted is run again, then reported."""
    try:
        restore()
    except BaseException:
        restore()
        raise


def preserved_rng(modules: nn.Module | World, start: RngState | None = None) -> Restoring:
    """Leave the generators as they were; inside, begin from `start` where given."""
    before = RngState.capture(world_of(modules))
    return Restoring(before.restore, None if start is None else start.restore)


def preserved_buffers(modules: nn.Module | World) -> Restoring:
    """Leave every buffer (BatchNorm statistics, counters) bitwise as it was."""
    return Restoring(SavedBuffers(world_of(modules)).restore)


class restored_on_error:
    """Put buffers and generators back when something raises inside."""

    def __init__(self, modules: nn.Module | World) -> None:
        self._world = world_of(modules)

    def __enter__(self) -> None:
        self._rng = RngState.capture(self._world)
        self._buffers = SavedBuffers(self._world)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            run_to_completion(self._restore)

    def _restore(self) -> None:
        self._buffers.restore()
        self._rng.restore()


def replaced_parameters(
    parameters: Sequence[Tensor],
    values: Sequence[Tensor],
    written: Callable[[], object] | None = None,
) -> Restoring:
    """Run with other parameter values, then put the old ones back by copy, bitwise.

    `written` is called after both.
    """
    saved = SavedValues(parameters)

    def copied(copy: Callable[[], None]) -> None:
        copy()
        if written is not None:
            written()
        # autocast's cached low-precision weights are stale after the copy
        torch.clear_autocast_cache()

    return Restoring(
        lambda: copied(saved.restore), lambda: copied(lambda: overwrite(parameters, values))
    )


def training_mode(modules: nn.Module | World, mode: bool) -> Restoring:
    """Put everything in train or eval mode, then give each module its own flag back."""
    world = world_of(modules)
    flags = [(module, module.training) for module in world.modules]

    def restore() -> None:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag

    def begin() -> None:
        for root in world.roots:
            root.train(mode)

    return Restoring(restore, begin)
