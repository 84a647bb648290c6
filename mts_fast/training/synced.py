"""What a step over ranks asks of SyncBatchNorm, whose forwards and backwards exchange."""

from __future__ import annotations

import itertools

from torch import nn

from mts_fast._check import fail
from mts_fast.distributed import Shard
from mts_fast.hypergradient.synced import active_sync_batch_norms, exchanging_batch_norms
from mts_fast.training.step_parts import StepParts

OP = "MTSStep"


def check_synced(step: StepParts) -> None:
    """Refuse SyncBatchNorm in train mode where torch cannot run it.

    Raises:
        RuntimeError: one on a CPU; one of the selector over ranks; one whose ranks are not those
            of the step.
    """
    model = step._objective.model
    for path, module in active_sync_batch_norms(model).items():
        if on_cpu(module, model):
            hint = (
                "torch runs it on GPUs alone where torch.distributed is initialised: build the"
                " model with BatchNorm there, or put it into eval mode"
            )
            expected = "free of SyncBatchNorm in train mode on a CPU"
            fail(RuntimeError, OP, "model", expected, f"one at {path!r}", hint)
    if step._ranks.size == 1 and exchanges_statistics(step):
        hint = "leave process_group= out, or freeze the layer with .eval()"
        got = "this process alone, and SyncBatchNorm over several"
        fail(RuntimeError, OP, "process_group", "that of the model's SyncBatchNorm", got, hint)
    for path in exchanging_batch_norms(step._scorer.selector):
        hint = "take BatchNorm: on every rank the selector sees the samples of all"
        expected = "free of SyncBatchNorm over ranks"
        fail(RuntimeError, OP, "selector", expected, f"one at {path!r}", hint)


def on_cpu(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module has its tensors there; one without tensors is where the model is."""
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters())
    return next(tensors).device.type == "cpu"


def exchanges_statistics(step: StepParts) -> bool:
    """Whether forwards of the training batch wait for other ranks."""
    return bool(exchanging_batch_norms(step._objective.model))


def check_synced_call(step: StepParts, shards: dict[str, Shard]) -> None:
    """Refuse batches that a rank would not run forward, while the others wait for it there.

    Raises:
        RuntimeError: a rank without samples of a batch that runs in train mode.
    """
    for name, shard in shards.items():
        if 0 in shard.sizes and (name != "val_labels" or step.validation_mode == "train"):
            hint = "spread the samples over all ranks, or freeze the layer with .eval()"
            expected = "given on every rank of a model with SyncBatchNorm in train mode"
            fail(RuntimeError, OP, name, expected, f"{shard.sizes} samples", hint)
