"""Undoes a step that raises: every piece of state that it may touch, bit for bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mts_fast._ambient import Ambient
from mts_fast._columns import bytes_of
from mts_fast._isolation import (
    RngState,
    SavedBuffers,
    World,
    open_count,
    restore_mapping,
    restore_open,
)
from mts_fast._multi_tensor import SavedValues
from mts_fast._sharding import is_sharded


class SavedOptimizer:
    """Parameters, state and groups of an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [(group, saved_dict(group)) for group in optimizer.param_groups]
        self._values = SavedValues(_tensors(optimizer))
        self._state = [(p, state, _entries(state)) for p, state in optimizer.state.items()]

    def restore(self) -> None:
        """Put everything back, into the tensors that held it."""
        optimizer = self._optimizer
        optimizer.param_groups[:] = [group for group, _ in self._groups]
        for group, saved in self._groups:
            restore_dict(group, saved)
        self._values.restore()
        before = {id(p) for p, *_ in self._state}
        for parameter in [p for p in optimizer.state if id(p) not in before]:
            del optimizer.state[parameter]
        for parameter, state, entries in self._state:
            optimizer.state[parameter] = state
            _restore_entries(state, entries)


@dataclass(frozen=True)
class SavedDict:
    """The entries of a mapping, and the values of those that are tensors."""

    entries: dict[str, tuple[Any, Any]]
    tensors: SavedValues


def saved_dict(values: dict[str, Any]) -> SavedDict:
    """What a mapping holds; `restore_dict` puts it back."""
    return SavedDict(_entries(values), SavedValues(_tensors_among(values.values())))


def restore_dict(values: dict[str, Any], saved: SavedDict) -> None:
    """Put objects and values back, into the tensors that held them."""
    saved.tensors.restore()
    _restore_entries(values, saved.entries)


def _entries(values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (the object, a copy of it; of a tensor itself)."""
    return {name: (v, v if isinstance(v, Tensor) else _copied(v)) for name, v in values.items()}


def _restore_entries(values: dict[str, Any], entries: dict[str, tuple[Any, Any]]) -> None:
    """Make a mapping hold these entries again."""
    for name in [n for n in values if n not in entries]:
        del values[name]
    for name, (original, before) in entries.items():
        values[name] = original if isinstance(original, Tensor) else _copied(before)


def _copied(value: Any) -> Any:
    """A copy that nothing else writes to; of a list of tensors only the list is copied."""
    if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
        return list(value)
    return copy.deepcopy(value)


def _tensors_among(values: Iterable[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and state tensors."""
    states = (state.values() for state in optimizer.state.values())
    return _parameters(optimizer) + _tensors_among(itertools.chain.from_iterable(states))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a `SavedOptimizer` copies: parameters and state tensors."""
    return sum(bytes_of(_tensors(optimizer)))


class Versions:
    """Tells which tensors of an optimizer were written to, by autograd's version counters."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> None:
        self._optimizer = optimizer
        self._names = names
        self._before = self._current()

    def moved(self) -> list[str]:
        """Names of tensors written to or added since construction, parameters first."""
        now = self._current()
        return [
            name for key, (name, version) in now.items() if self._before.get(key) != (name, version)
        ]

    def _current(self) -> dict[int, tuple[str, int]]:
        versions: dict[int, tuple[str, int]] = {}
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            versions[id(p)] = self._names.get(p, f"parameter {i}"), p._version
        for i, p in enumerate(parameters):
            for key, value in self._optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    name = f"{key} of {self._names.get(p, f'parameter {i}')}"
                    versions[id(value)] = name, value._version
        return versions


class Transaction:
    """Snapshot at the start of a call; `roll_back` restores it until `committed` is set."""

    def __init__(
        self,
        world: World,
        optimizer: torch.optim.Optimizer,
        selector_optimizer: torch.optim.Optimizer,
        counters: Callable[[], Any],
        restore_counters: Callable[[Any], None],
        reshard: Callable[[], None],
    ) -> None:
        self.committed = False
        self._reshard = reshard
        reshard()  # modules hold their shards where they are looked at
        self._open = open_count()
        self._ambient = Ambient.capture()
        self._modes = [(module, module.training) for module in world.modules]
        # functional_call puts other tensors in place of parameters for a while
        self._named = [(module, dict(module._parameters)) for module in world.modules]
        self._world = world
        self._buffers = SavedBuffers(world)
        # copies in a first call, in which a forward may turn out to write to parameters
        self._parameters = SavedValues([])
        self._versions = [(p, p._version) for p in world.parameters()]
        self.generators = RngState.capture(world)  # at the start of the call
        self._selector = SavedOptimizer(selector_optimizer)
        parameters = _parameters(optimizer) + _parameters(selector_optimizer)
        self._gradients = [(p, p.grad) for p in parameters]
        self._optimizer = optimizer
        self._saved: SavedOptimizer | None = None
        self._counters = counters()
        self._restore_counters = restore_counters

    def save_parameters(self) -> None:
        """Copy all parameters, until it is known which of them the forwards write to."""
        self._parameters = SavedValues(self._world.parameters())

    def written_parameters(self) -> list[Tensor]:
        """Parameters that forwards wrote to and that were not known to be written. In a first call
        values are compared, too: version counters miss writes through `.data`."""
        known = {id(p) for p in self._world.written}
        seen = {id(p) for p, version in self._versions if p._version != version}
        saved = zip(self._parameters.tensors, self._parameters.values(), strict=True)
        seen |= {id(p) for p, before in saved if not _equal(p, before)}
        return [p for p, _ in self._versions if id(p) in seen - known]

    def forget_parameters(self) -> None:
        """Free the copies of `save_parameters`."""
        self._parameters = SavedValues([])

    def save_optimizer(self) -> None:
        """Copy the classifier's parameters and optimizer state, which its step moves."""
        self._saved = SavedOptimizer(self._optimizer)

    @property
    def copies_optimizer(self) -> bool:
        """Whether the optimizer's step can be undone."""
        return self._saved is not None

    def rewind(self) -> None:
        """Back to the start, so that the rows up to the selector's step can be run again."""
        self._ambient.restore()
        restore_open(self._open)
        self._reshard()
        for module, mode in self._modes:
            module.training = mode
        for module, named in self._named:
            restore_mapping(module._parameters, named)
        self._buffers.restore()
        self._parameters.restore()
        self.generators.restore()
        self._restore_counters(self._counters)

    def roll_back(self) -> None:
        """Undo the call, unless it is complete. May be repeated."""
        if self.committed:
            return
        self.rewind()
        self._selector.restore()
        if self._saved is not None:
            self._saved.restore()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


def _equal(a: Tensor, b: Tensor) -> bool:
    if is_sharded(a):
        a, b = a.to_local(), b.to_local()  # type: ignore[attr-defined]
    return torch.equal(a, b)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
