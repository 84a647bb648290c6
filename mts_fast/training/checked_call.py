"""Checks the arguments of one call, and tells the other ranks of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.distributed import Header, Opened
from mts_fast.training.accumulated import Arguments, Waiting
from mts_fast.training.accumulated import joined as joined_calls
from mts_fast.training.batch import (
    check_batch,
    check_validation,
    counting_samples,
    joined,
)
from mts_fast.training.call import Call
from mts_fast.training.running import check_can_run, follow_changes
from mts_fast.training.sampled.batch_statistics import batch_norms
from mts_fast.training.sampled.compute import Costs
from mts_fast.training.selector_inputs import OnlineFeatures
from mts_fast.training.sharded import check_sharded_call
from mts_fast.training.step_parts import StepParts
from mts_fast.training.synced import check_synced, check_synced_call, exchanges_statistics

OP = "MTSStep"
# attributes of a step that decide what ranks ask of each other
OPTIONS = (
    *("schedule", "validation_mode", "val_objective", "selector_every", "warmup_steps"),
    *("hypergradient_lr", "max_grad_norm", "clip_virtual_step", "track_gsnr", "accumulate"),
    *("compute", "candidate_dtype"),
)


def checked_call(step: StepParts, arguments: Arguments) -> Call | None:
    """The call, begun on every rank; None where its batch waits for others (accumulate=).

    Raises:
        Exception: what is wrong here, or that another rank has failed.
    """
    if len(step._waiting) + 1 < step.accumulate:
        step._ranks.together(lambda: _check_waiting(step, arguments))
        step._waiting.append(Waiting.of(arguments))
        return None

    def check() -> Call:
        step._engines.begin()
        check_can_run(step)
        check_synced(step)
        follow_changes(step)
        if step._waiting:
            _checked(step, arguments)  # what is wrong is named where it comes in
        for waiting in step._waiting:
            waiting.check_unchanged()
        calls = [*(w.arguments for w in step._waiting), arguments]
        if step._streams_calls:
            _stream(step, max(len(c.batch.labels) for c in calls))
        return _checked(step, joined_calls(calls))

    call, opened = step._ranks.open(check, lambda call: _header(step, call))
    step._was_compared = True
    return _with_shards(step, call, opened)


def checks_values(step: StepParts, labels: object) -> bool:
    """Whether values are read to check them."""
    on_gpu = isinstance(labels, Tensor) and labels.is_cuda
    return step.check == "always" or (step.check == "auto" and not on_gpu)


def num_classes(step: StepParts) -> int | None:
    """Number of classes of the selector, else of the class weights; None where neither says."""
    known = getattr(step.selector, "num_classes", None)
    weights = step.class_weight
    return len(weights) if known is None and weights is not None else known


def _stream(step: StepParts, micro_batch: int) -> None:
    """Take that many samples at a time."""
    step._micro_batch = micro_batch
    step._engines.set_micro_batch(micro_batch)
    if isinstance(step._features, OnlineFeatures):
        step._features.micro_batch = micro_batch


def _check_waiting(step: StepParts, arguments: Arguments) -> None:
    """A call that will wait, by itself and beside the one before it."""
    check_can_run(step)
    check_synced(step)
    follow_changes(step)
    _checked(step, arguments)
    for waiting in step._waiting[-1:]:
        waiting.check_unchanged()
        joined_calls([waiting.arguments, arguments])


def _checked(step: StepParts, arguments: Arguments) -> Call:
    batch, selector_batch = arguments.batch, arguments.selector_batch
    check_values = checks_values(step, batch.labels)
    classes = num_classes(step)
    several = step._ranks.size > 1  # where one rank may have no samples
    first = check_batch(batch, classes, check_values=check_values, may_be_empty=several)
    second = None
    if selector_batch is not None:
        second = check_batch(
            selector_batch,
            classes,
            check_values=check_values,
            prefix="selector_batch.",
            may_be_empty=several,
        )
    validation = check_validation(
        arguments.val_inputs,
        arguments.val_labels,
        arguments.val_weights,
        arguments.val_groups,
        needs_groups=step.val_objective != "mean",
        custom_loss=step._validation.loss is not None,
        check_values=check_values,
        may_be_empty=several,
    )
    updates_selector = step.steps % step.selector_every == 0
    layout = step._engines.layout_of(first)
    return Call(
        first,
        second,
        validation,
        updates_selector=updates_selector,
        weighted=step.steps >= step.warmup_steps,
        schedule=step.schedule,
        computed=None,
        costs=_costs(step, len(first), len(validation)),
        number=step.steps,
        probing=updates_selector and step._engines.is_probing(layout),
        check_values=check_values,
    )


def _with_shards(step: StepParts, call: Call, opened: Opened) -> Call:
    """The call with what the ranks have told each other."""
    shards = opened.shards
    first, validating, counting, *second = shards
    batches = {"labels": first, "val_labels": validating}
    if second:
        batches["selector_batch.labels"] = second[0]
    for name, shard in batches.items():
        if shard.total == 0:
            hint = "pass at least one sample on one of them"
            fail(ValueError, OP, name, "non-empty on some rank", "none on any", hint)
    if step._objective.sharding is not None:
        check_sharded_call(step, batches.values())
    if exchanges_statistics(step):
        check_synced_call(step, batches)
    batch = replace(call.batch, shard=first)
    validation = joined(
        step._ranks, call.validation, validating, counting, check_values=call.check_values
    )
    selector_batch = call.selector_batch
    if selector_batch is not None:
        selector_batch = replace(selector_batch, shard=second[0])
    return replace(
        call,
        batch=batch,
        validation=validation,
        selector_batch=selector_batch,
        computed=_computed(step, first.total),
        costs=_costs(step, first.total, validating.total),
        probing=opened.probing,
    )


def _computed(step: StepParts, size: int) -> int | None:
    """How many of the samples of all ranks are run; None: all, in one stage."""
    number = step._compute.number(size)
    if number is not None and step._objective.sharding is not None:
        hint = "leave compute= out: every sample of every rank is computed"
        fail(RuntimeError, OP, "compute", "None where the model is sharded", number, hint)
    if number is not None and exchanges_statistics(step):
        hint = "leave compute= out, or freeze the layer with .eval()"
        expected = "None where the model has SyncBatchNorm in train mode"
        fail(RuntimeError, OP, "compute", expected, number, hint)
    return number


def _header(step: StepParts, call: Call) -> Header:
    """What the other ranks are told; a process alone compares nothing."""
    batches = [b for b in (call.batch, call.validation, call.selector_batch) if b is not None]
    counting = counting_samples(
        call.validation,
        custom_loss=step._validation.loss is not None,
        check_values=call.check_values,
    )
    first, validating, *second = map(len, batches)
    sizes = (first, validating, counting, *second)
    if step._ranks.size == 1:
        return Header(sizes, probing=call.probing)
    engines = step._engines
    same: dict[str, object] = {
        "the number of completed steps": step.steps,
        "the options": {name: getattr(step, name) for name in OPTIONS},
        "the trainable parameters": _described(step),
        "the engine": engines.engine_for(engines.layout_of(call.batch)).name,
        "the arguments": [
            name
            for name, value in (
                ("selector_batch", call.selector_batch),
                ("val_weights", call.validation.weights),
                ("val_groups", call.validation.groups),
            )
            if value is not None
        ],
    }
    if step.compute is not None:  # drawn samples change their rank
        same["the inputs"] = [[t.ndim for t in b.tensors()] for b in batches if b is not None]
    weights = step.class_weight
    same["class_weight"] = None if weights is None else weights.tolist()
    if not any(isinstance(g["lr"], Tensor) for g in step.optimizer.param_groups):
        same["the learning rates"] = [g["lr"] for g in step.optimizer.param_groups]
    if step._objective.sharding is not None or exchanges_statistics(step):
        # each is a forward in which the ranks wait for each other
        same["the number of micro-batches"] = [
            max(1, -(-len(b) // (step._micro_batch or max(1, len(b))))) for b in batches
        ]
    number = step.steps + 1
    if not step._was_compared or number & (number - 1) == 0:
        same["the values of the selector's parameters"] = _checksums(step.selector.parameters())
        if step._objective.sharding is None:
            same["the values of the model's parameters"] = _checksums(step._trainable)
    return Header(sizes, same, call.probing, call.number)


def _described(step: StepParts) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of each."""
    names = {id(p): name for name, p in step._objective.model.named_parameters()}
    return [
        (names.get(id(p), "of the loss"), tuple(p.shape), str(p.dtype)) for p in step._trainable
    ]


def _checksums(parameters: Iterable[Tensor]) -> list[int]:
    """A number for each tensor that changes with any bit of it. Waits for a GPU."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [p.detach().contiguous().view(kinds[p.element_size()]) for p in parameters]
    # odd factors: entries that change places change the sum
    return [
        int((b.flatten().long() * torch.arange(1, 2 * b.numel(), 2, device=b.device)).sum())
        for b in bits
    ]


def _costs(step: StepParts, size: int, validation: int) -> Costs:
    """What the price of a sampled step of so many samples depends on."""
    reads_features = step._features.watched is not None
    passes = 2 if reads_features and batch_norms(step._objective.world) else 1
    return Costs(passes, validation / max(1, size))
