"""Runs one call of a step: complete, or undone to the last bit."""

from __future__ import annotations

import copy
import logging
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mts_fast import ops
from mts_fast._check import fail
from mts_fast._interrupts import HeldInterrupts
from mts_fast._isolation import run_to_completion
from mts_fast.distributed import check_ranks
from mts_fast.hypergradient import Refused
from mts_fast.ops.update_rules import check_optimizer
from mts_fast.training.algorithm import Algorithm
from mts_fast.training.batch_run import BatchRunner
from mts_fast.training.call import Call
from mts_fast.training.gradient_scaling import GradientScaling, needs_scaler
from mts_fast.training.gradients import set_gradients
from mts_fast.training.optimizer_step import refuse_torn, stepped_on_all_ranks
from mts_fast.training.pending_gap import PendingGap
from mts_fast.training.result import StepResult
from mts_fast.training.step_graph import StepGraph
from mts_fast.training.step_parts import StepParts
from mts_fast.training.transaction import (
    Transaction,
    restore_dict,
    saved_dict,
)

OP = "MTSStep"
logger = logging.getLogger("mts_fast")


# first scale of the step's own scaler, torch's default, and its divisor where float16 overflows
OWN_SCALE, OWN_BACKOFF = 2.0**16, 16.0


def check_can_run(step: StepParts) -> None:
    """Refuse nested calls, half-stepped parameters, disabled gradients and other ranks than those
    that the step was built for."""
    if step._running is not None:
        hint = "build one MTSStep for each thread or inner loop"
        got = "a call from inside another (a hook?), or from a second thread"
        fail(RuntimeError, OP, "the call", "complete before the next one", got, hint)
    if step._torn:
        refuse_torn(step._torn)
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        hint = "leave torch.no_grad() or torch.inference_mode() around the call"
        got = "a call without gradients"
        fail(RuntimeError, OP, "the call", "made with gradients enabled", got, hint)
    sharding = step._objective.sharding
    check_ranks(OP, step.model, step.process_group, step._ranks, sharding)


def run_call(step: StepParts, call: Call) -> StepResult:
    """Take the step; where anything raises, all state is restored."""
    try:
        try:
            step._running = call
            return _run(step, call)
        finally:
            _ended(step, call)
    finally:  # for an exception in the first clean-up
        _ended(step, call)


def _ended(step: StepParts, call: Call) -> None:
    if step._running is call:
        step._running = None


def _run(step: StepParts, call: Call) -> StepResult:
    _adopt_scaler(step)
    # an optimizer may have stepped since autocast last cast the weights
    torch.clear_autocast_cache()
    if step._gap is not None:
        step._gap.report()
        step._gap = None
    backend = ops.current_backend() if step.backend == "auto" else step.backend
    with HeldInterrupts(), ops.use_backend(backend):
        if step._graph is not None:
            result = _by_graph(step, step._graph, call)
            if result is not None:
                return result
        transaction = _transaction(step)
        try:
            try:
                return _complete(step, call, transaction)
            except BaseException:
                run_to_completion(transaction.roll_back)
                raise
        except BaseException:  # before the first roll-back had begun; a second one is harmless
            transaction.roll_back()
            raise


def _transaction(step: StepParts) -> Transaction:
    sharding = step._objective.sharding
    return Transaction(
        step._world,
        step.optimizer,
        step.selector_optimizer,
        lambda: _counters(step),
        lambda saved: _restore_counters(step, saved),
        lambda: None if sharding is None else sharding.reshard(),
    )


def _by_graph(step: StepParts, graph: StepGraph, call: Call) -> StepResult | None:
    """The step by replay of its recording; None where it has to run without one."""
    layout = step._engines.layout_of(call.batch)
    if call.probing or not step._knows_writes:
        return None
    kind = graph.kind_of(step, call, layout)
    if not graph.replays(step, kind):
        return None
    if graph.needs_recording(kind):
        # nothing is computed in a recording, but objects are put in place of others
        transaction = _transaction(step)
        try:
            graph.record(step, kind, lambda static: _bare_step(step, static, layout))
        except Exception as error:
            run_to_completion(transaction.roll_back)
            graph.refuse(kind, error)
            return None
        except BaseException:
            run_to_completion(transaction.roll_back)
            raise
        transaction.generators.restore()
    engines = step._engines
    engines.begin()
    try:
        result, allowed = graph.replay(kind)
        if step.selector_scheduler is not None:
            step.selector_scheduler.step()
    except BaseException:
        step._torn = "what the graph of a step writes to"
        raise
    if call.updates_selector:
        engines.served(layout)
    if result.self_check is not None and allowed is not None:
        step._gap = PendingGap(result.self_check, allowed, result.engine)
    step.steps += 1
    step._compute.count(call.costs, step._ranks)
    engines.commit()
    return result


def _bare_step(step: StepParts, call: Call, layout: str) -> tuple[StepResult, Tensor | None]:
    """Rows 1 to 9 and the optimizer's step, without anything that undoes them."""
    algorithm, scaling = _algorithm(step), GradientScaling()
    prepared = algorithm.prepare(call, layout, scaling)
    outcome = algorithm.finish(call, prepared, scaling)
    parameters = step._engines.parameters
    set_gradients(step.optimizer, parameters, outcome.gradient)
    scaling.step(step.optimizer, parameters, step.max_grad_norm, overflow=False)
    return outcome.result, prepared.allowed


def refresh_worlds(step: StepParts) -> None:
    """Look for modules that were added or replaced since the last call."""
    for world in (
        step._world,
        step._objective.world,
        step._validation.world,
        step._scorer.world,
    ):
        world.refresh()


def _complete(step: StepParts, call: Call, transaction: Transaction) -> StepResult:
    """Rows 1 to 9 and the optimizer's step; whole when the transaction is committed."""
    algorithm = _algorithm(step)
    engines = step._engines
    layout = engines.layout_of(call.batch)
    engines.begin()
    if not step._knows_writes:
        transaction.save_parameters()
    # repeated where an engine refuses, where float16 overflows under the step's own scaler, and
    # where a forward is first seen to write to parameters
    while True:
        scaling = GradientScaling(step.scaler)
        try:
            prepared = algorithm.prepare(call, layout, scaling)
        except Refused as refused:
            transaction.rewind()
            _next_engine(step, layout, refused)
            probing = call.updates_selector and engines.is_probing(layout)
            call = replace(call, probing=step._ranks.union([probing])[0])
            continue
        scale = _own_scale(step) if prepared.overflow else 1.0
        if scale > 1.0:
            # the scaler is the step's own: repeat at a lower scale instead of skipping the step
            transaction.rewind()
            _take_own_scaler(step, max(1.0, scale / OWN_BACKOFF))
            continue
        written = transaction.written_parameters()
        if step._knows_writes:
            break
        written = _of_any_rank(step, written)
        if not written:
            break
        for world in (step._world, step._objective.world, step._validation.world):
            world.note_written(written)
        transaction.rewind()
    transaction.forget_parameters()
    step._knows_writes = True
    outcome = algorithm.finish(call, prepared, scaling, lambda: _check_written(step, written))
    stepped = stepped_on_all_ranks(step, outcome, prepared, scaling, transaction)
    if prepared.gap is not None and prepared.allowed is not None and not prepared.guarded:
        step._gap = PendingGap(prepared.gap, prepared.allowed, prepared.engine)
    step.steps += 1
    step._compute.count(call.costs, step._ranks)
    step.skipped_steps += not stepped
    engines.commit()
    if step._graph is not None:
        step._graph.ran(step, call, layout, transaction.generators, prepared.run)
    result = outcome.result if stepped else outcome.result.as_skipped()
    transaction.committed = True
    return result


def _next_engine(step: StepParts, layout: str, refused: Refused) -> None:
    """Go on to an engine that may serve, on every rank."""

    def choose() -> None:
        step._engines.refuse(layout, refused)
        step._engines.engine_for(layout)

    step._ranks.together(choose)


def _of_any_rank(step: StepParts, written: list[Tensor]) -> list[Tensor]:
    """Parameters that a first forward writes to, here or on another rank: from then on every
    forward but the training one restores them."""
    parameters = list(step._world.parameters())
    seen = {id(p) for p in written}
    flags = step._ranks.union([id(p) in seen for p in parameters])
    return [p for p, flag in zip(parameters, flags, strict=True) if flag]


def _check_written(step: StepParts, written: list[Tensor]) -> None:
    """Refuse a write that begins after the first call: there is no copy to restart from."""
    if written:
        names: dict[Tensor, str] = {p: n for n, p in step.model.named_parameters()}
        got = f"a write to {names.get(written[0], 'one')!r}, which earlier calls did not make"
        hint = "keep what forward writes in a buffer, or build a new MTSStep"
        fail(RuntimeError, OP, "model", "as it was in writing to its parameters", got, hint)


def follow_changes(step: StepParts) -> None:
    """Take over modules that were added or replaced, and parameters that were frozen, unfrozen or
    added, since the last call."""
    refresh_worlds(step)
    check_optimizer(step.optimizer, op=OP)
    present = ops.trainable_parameters(step.optimizer)
    before = step._trainable
    if len(present) == len(before) and all(map(operator.is_, present, before)):
        return
    step._trainable = present
    step._engines = step._engines.with_parameters(step._objective.tensors_of(present))


def _adopt_scaler(step: StepParts) -> None:
    """Make a scaler for float16 autocast without one, where small gradients round to 0."""
    parameters = step._engines.parameters
    if step.scaler is None and needs_scaler(parameters):
        logger.info("%s: float16 autocast without scaler=: taking a GradScaler of its own", OP)
        _take_own_scaler(step, OWN_SCALE)


def _take_own_scaler(step: StepParts, scale: float) -> None:
    device = step._engines.parameters[0].device.type
    step.scaler = torch.amp.GradScaler(device, init_scale=scale)
    step._owns_scaler = True


def _own_scale(step: StepParts) -> float:
    """The scale of the step's own scaler; 1 where the step has made none."""
    return step.scaler.get_scale() if step._owns_scaler and step.scaler is not None else 1.0


def _algorithm(step: StepParts) -> Algorithm:
    runner = BatchRunner(
        step._ranks,
        step._objective,
        step._features,
        step._scorer,
        step._trainer,
        step._engines.parameters,
        step._micro_batch,
        step.candidate_dtype,
    )
    return Algorithm(
        step._ranks,
        step._objective,
        step._validation,
        step.optimizer,
        step._engines,
        runner,
        validation_mode=step.validation_mode,
        val_objective=step.val_objective,
        hypergradient_lr=step.hypergradient_lr,
        virtual_norm=step.max_grad_norm if step.clip_virtual_step else None,
        micro_batch=step._micro_batch,
        track_gsnr=step.track_gsnr,
        compute=step._compute,
    )


def _counters(step: StepParts) -> dict[str, Any]:
    """State that a step changes beside tensors and generators."""
    scheduler = step.selector_scheduler
    scaler = step.scaler
    return {
        "features": step._features.state_dict(),
        "scheduler": None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
        "scaler": None if scaler is None else saved_dict(vars(scaler)),
        "steps": step.steps,
        "skipped_steps": step.skipped_steps,
        "gap": step._gap,
        "engines": step._engines.state_dict(),
        "compute": step._compute.state_dict(),
    }


def _restore_counters(step: StepParts, saved: dict[str, Any]) -> None:
    step._features.load_state_dict(saved["features"])
    if step.selector_scheduler is not None:
        step.selector_scheduler.load_state_dict(copy.deepcopy(saved["scheduler"]))
    if step.scaler is not None:
        restore_dict(vars(step.scaler), saved["scaler"])
    step.steps = saved["steps"]
    step.skipped_steps = saved["skipped_steps"]
    step._gap = saved["gap"]
    step._engines.load_state_dict(saved["engines"])
    step._compute.load_state_dict(saved["compute"])
