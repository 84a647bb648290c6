"""What a step asks of a model under fully_shard, beside what it asks of every model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mts_fast import ops
from mts_fast._check import fail
from mts_fast._sharding import Sharding
from mts_fast.distributed import Shard
from mts_fast.ops.virtual_update import optimizer_states
from mts_fast.reference.update_rules import largest_gradient
from mts_fast.reference.update_rules.rule import ElementwiseState
from mts_fast.training.gradient_scaling import needs_scaler
from mts_fast.training.step_parts import StepParts

OP = "MTSStep"


def check_sharded(
    sharding: Sharding, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    """Refuse what shards cannot have.

    Raises:
        RuntimeError: an optimizer that looks at whole tensors; loss scaling.
    """
    if scaler is not None:
        hint = "take bfloat16, which needs none"
        fail(RuntimeError, OP, "scaler", "None where the model is sharded", "one", hint)
    states = optimizer_states(sharding.optimizer(optimizer)).values()
    if not all(isinstance(state, ElementwiseState) for state in states):
        hint = "take SGD, Adam, AdamW, RMSprop, NAdam or RAdam, or DistributedDataParallel"
        expected = "elementwise where the model is sharded"
        fail(RuntimeError, OP, "optimizer", expected, type(optimizer).__name__, hint)


def virtual_update_of_shards(
    sharding: Sharding, optimizer: torch.optim.Optimizer, gradient: list[Tensor | None]
) -> ops.VirtualUpdate:
    """Row 4 on this rank's shards; asks all ranks for max |g| where the rule reads it."""
    view, largest = sharding.optimizer(optimizer), None
    states = optimizer_states(view)
    if any(s.has_second_moment for s in states.values()):
        # of one dtype on every rank, also where all shards are empty
        zero = next(iter(states)).new_zeros(1)
        largest = sharding.largest(
            largest_gradient([zero, *(g for g in gradient if g is not None)])
        )
    return ops.virtual_update(view, gradient, largest=largest)


def check_sharded_call(step: StepParts, shards: Iterable[Shard]) -> None:
    """Refuse batches for which ranks would not run the same forwards.

    Raises:
        RuntimeError: a rank without samples; float16 autocast.
    """
    if needs_scaler(step._trainable):
        hint = "take bfloat16"
        expected = "other than float16 where the model is sharded"
        fail(RuntimeError, OP, "autocast", expected, "float16", hint)
    for shard in shards:
        if 0 in shard.sizes:
            hint = "spread the samples over all ranks, which gather its parameters together"
            expected = "given on every rank of a sharded model"
            fail(RuntimeError, OP, "inputs", expected, f"{shard.sizes} samples", hint)
