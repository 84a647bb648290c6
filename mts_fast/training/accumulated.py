"""Batches that wait until there are enough for one step (gradient accumulation)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.hypergradient.nests import join_nests, leaves
from mts_fast.training.batch import SelectorBatch

OP = "MTSStep"
VALIDATION = ("val_inputs", "val_labels", "val_weights", "val_groups")


@dataclass(frozen=True)
class Arguments:
    """What a call was given."""

    batch: SelectorBatch
    selector_batch: SelectorBatch | None
    val_inputs: Any
    val_labels: Any
    val_weights: Any
    val_groups: Any


@dataclass(frozen=True)
class Waiting:
    """A call that waits for others; its tensors are those of the caller."""

    arguments: Arguments
    versions: dict[str, list[int]]  # of the tensors of each argument, when the call was made

    @classmethod
    def of(cls, arguments: Arguments) -> Waiting:
        """A call as it is now."""
        return cls(arguments, _versions(arguments))

    def check_unchanged(self) -> None:
        """Refuse a call whose tensors were written to.

        Raises:
            RuntimeError: names the argument.
        """
        for name, versions in _versions(self.arguments).items():
            if versions != self.versions[name]:
                hint = "pass tensors of its own to each call; drop_waiting() forgets the step"
                expected = "left as they are until the step is complete"
                got = "one that was written to after its call"
                fail(RuntimeError, OP, name, expected, got, hint)


def _versions(arguments: Arguments) -> dict[str, list[int]]:
    """How often each tensor was written to, by argument."""
    rows, second = arguments.batch, arguments.selector_batch
    entries = {f.name: getattr(rows, f.name) for f in fields(SelectorBatch)}
    if second is not None:
        entries |= {
            f"selector_batch.{f.name}": getattr(second, f.name) for f in fields(SelectorBatch)
        }
    for name in VALIDATION:
        entries[name] = getattr(arguments, name)
    return {
        name: [0 if t.is_inference() else t._version for t in leaves(value)]
        for name, value in entries.items()
    }


def joined(calls: Sequence[Arguments]) -> Arguments:
    """The arguments of one call with the samples of all.

    Raises:
        ValueError, TypeError: calls that do not fit together.
    """
    if len(calls) == 1:
        return calls[0]
    # the same objects in every call are one validation set, not several
    first = calls[0]
    is_same = all(getattr(c, n) is getattr(first, n) for c in calls for n in VALIDATION)
    validating = calls[:1] if is_same else calls
    return Arguments(
        _joined_batches([c.batch for c in calls]),
        _joined_batches([c.selector_batch for c in calls]),
        *(_joined(name, [getattr(c, name) for c in validating]) for name in VALIDATION),
    )


def _joined_batches(batches: Sequence[SelectorBatch | None]) -> Any:
    present = [b for b in batches if b is not None]
    if not present:
        return None
    if len(present) < len(batches):
        _refuse("selector_batch", f"in {len(present)} of {len(batches)} calls")
    names = [f.name for f in fields(SelectorBatch)]
    return SelectorBatch(*(_joined(name, [getattr(b, name) for b in present]) for name in names))


def _joined(name: str, values: Sequence[Any]) -> Any:
    """Samples of all calls, along the first axis."""
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        _refuse(name, f"in {sum(v is not None for v in values)} of {len(values)} calls")
    try:
        return join_nests(values, _concatenated)
    except (TypeError, ValueError, RuntimeError) as error:
        _refuse(name, f"calls that do not fit together: {error}")


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim == 0:  # no samples in it
        return tensors[0]
    return torch.cat(list(tensors))


def _refuse(name: str, got: str) -> Any:
    hint = "give the calls of one step the same arguments, of the same shape but for the first axis"
    fail(ValueError, OP, name, "given alike in every call that is accumulated", got, hint)
