"""Steps in checkpoints of torch.distributed.checkpoint, resumed on any number of ranks.

`dcp.save` takes a step as it is. `dcp.load` fills the tensors that a state already has, and a new
step has no optimizer state yet: `StepLoadPlanner` makes room for what the checkpoint holds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from mts_fast._check import check_mapping, describe, fail

OP = "StepLoadPlanner"
# entries of a step's state with the state of its parameters, by number
OPTIMIZERS = ("optimizer", "selector_optimizer")
# mappings within entries that may be empty: a checkpoint leaves these out
INSIDE = {**dict.fromkeys(OPTIMIZERS, "state"), "online": "running"}


class StepLoadPlanner(DefaultLoadPlanner):
    """The `planner` of torch.distributed.checkpoint.load for a state with an MTSStep in it.

    Args:
        state: the mapping that is loaded: name -> MTSStep, or anything else that
            torch.distributed.checkpoint takes.

    Raises:
        TypeError: no mapping.
        ValueError: no MTSStep in it; when it loads, a checkpoint without that name or one that no
            DefaultSavePlanner wrote.

    Notes:
        The checkpoint may be of another number of ranks, and of a plain model where this one is
        under fully_shard, or the other way round; each rank reads its shards alone. What is read
        lies in new tensors, and the step takes it over by `load_state_dict`, which checks it first.

    Source: docs/scaling.md.

    Example:
        >>> import tempfile, torch, mts_fast
        >>> import torch.distributed.checkpoint as dcp
        >>> from mts_fast.distributed.checkpoint import StepLoadPlanner
        >>> model, selector = torch.nn.Linear(4, 3), mts_fast.Selector(0, 3)
        >>> step = mts_fast.MTSStep(
        ...     model, torch.optim.Adam(model.parameters()),
        ...     selector, torch.optim.AdamW(selector.parameters()), online_features=False)
        >>> state = {"step": step}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = dcp.save(state, checkpoint_id=folder)
        ...     dcp.load(state, checkpoint_id=folder, planner=StepLoadPlanner(state))
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        hint = "pass the mapping that is loaded: {'step': step}"
        entries = check_mapping(OP, "state", state, hint)
        self._steps = {n: s for n, s in entries.items() if hasattr(s, "selector_optimizer")}
        if not self._steps:
            got = ", ".join(f"{n!r}: {describe(v)}" for n, v in entries.items()) or "nothing"
            fail(ValueError, OP, "state", "given an MTSStep", got[:80], hint)
        self._places: dict[str, tuple[dict[Any, Any] | list[Any], Any]] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Replace the state of each step by one with room for all that was saved of it."""
        assert metadata is not None
        paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data or {}
        for name, step in self._steps.items():
            room = _Room(step, state_dict[name])
            for key, path in paths.items():
                if path[0] == name and len(path) > 1:
                    self._places[key] = room.add(path[1:], metadata.state_dict_metadata[key])
            if not room.state:
                hint = "save it by torch.distributed.checkpoint.save({name: step}, ...)"
                got = ", ".join(sorted({repr(path[0]) for path in paths.values()})) or "nothing"
                fail(ValueError, OP, "the checkpoint", f"given {name!r}", got[:80], hint)
            state_dict[name] = room.completed()
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put what is no tensor into its place, under keys as they were: text stands for numbers
        in a checkpoint."""
        place = self._places.get(read_item.dest_index.fqn)
        if place is None:
            super().load_bytes(read_item, value)
            return
        container, key = place
        container[key] = torch.load(value, weights_only=False)


class _Room:
    """A step's state of new tensors, entry by entry; the step's present one says which are shards,
    and which keys are numbers."""

    def __init__(self, step: Any, present: dict[str, Any]) -> None:
        self.state: dict[str, Any] = {}
        self._present = present
        self._parameters = {
            name: [p for group in getattr(step, name).param_groups for p in group["params"]]
            for name in OPTIMIZERS
        }

    def add(self, path: tuple[Any, ...], saved: Any) -> tuple[Any, Any]:
        """Make an entry; the container that it is in, and its key there."""
        container: Any = self.state
        present: Any = self._present
        for i, part in enumerate(path):
            key = self._key(path[:i], part, present)
            present = _entry(present, key)
            if isinstance(container, list):
                container += [None] * (key + 1 - len(container))
            if i == len(path) - 1:
                tensor = isinstance(saved, TensorStorageMetadata)
                container[key] = self._tensor(path, saved, present) if tensor else None
                return container, key
            if _entry(container, key) is None:
                container[key] = [] if isinstance(path[i + 1], int) else _empty_like(present)
            container = container[key]
        raise AssertionError("a path has parts")

    def completed(self) -> dict[str, Any]:
        """The state, with the mappings that have no entries."""
        for name, value in self._present.items():
            if isinstance(value, Mapping):
                entry = self.state.setdefault(name, {})
                if INSIDE.get(name) in value:
                    entry.setdefault(INSIDE[name], {})
        return self.state

    def _key(self, above: tuple[Any, ...], part: Any, present: Any) -> Any:
        """A key as it was before it became text."""
        if len(above) == 2 and above[0] in OPTIMIZERS and above[1] == "state":
            return int(part)
        if isinstance(present, Mapping) and part not in present:
            return next((key for key in present if str(key) == part), part)
        return part

    def _tensor(self, path: tuple[Any, ...], saved: TensorStorageMetadata, present: Any) -> Tensor:
        """A new tensor, sharded where the step's own one, or the parameter that it is state of,
        is."""
        like = present
        if path[0] in OPTIMIZERS and path[1] == "state":
            like = self._parameters[path[0]][int(path[2])]
        dtype = saved.properties.dtype
        # the count of steps of an optimizer is a number on the CPU
        is_vector = bool(saved.size) or like is present
        if isinstance(like, Tensor) and like.shape == saved.size and is_vector:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(saved.size, dtype=dtype)


def _entry(container: Any, key: Any) -> Any:
    """An entry of a mapping or list, None where there is none."""
    if isinstance(container, Mapping):
        return container.get(key)
    if isinstance(container, list) and isinstance(key, int) and key < len(container):
        return container[key]
    return None


def _empty_like(present: Any) -> Any:
    """An empty mapping of the same class (a scheduler's milestones are a Counter)."""
    return type(present)() if isinstance(present, dict) else {}
