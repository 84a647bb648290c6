"""The step of the classifier's optimizer: on all ranks, or undone."""

from __future__ import annotations

from typing import NoReturn

from mts_fast.training.call import Outcome, Prepared
from mts_fast.training.gradient_scaling import GradientScaling
from mts_fast.training.gradients import set_gradients
from mts_fast.training.step_parts import StepParts
from mts_fast.training.transaction import Transaction, Versions, state_bytes

OP = "MTSStep"
# largest copy that is made by default so that `optimizer.step()` can be undone: a ResNet-50 with
# momentum (102 MB of parameters, 102 MB of buffers) is just within
ATOMIC_BYTES = 256 * 2**20


def stepped_on_all_ranks(
    step: StepParts,
    outcome: Outcome,
    prepared: Prepared,
    scaling: GradientScaling,
    transaction: Transaction,
) -> bool:
    """Set the gradients and step the optimizer, on all ranks or, with an error, on none; whether it
    stepped."""
    moved = False

    def advance() -> bool:
        nonlocal moved
        sharding, parameters = step._objective.sharding, step._engines.parameters
        if sharding is None:
            set_gradients(step.optimizer, parameters, outcome.gradient)
        else:
            sharding.spread(step.optimizer, parameters, outcome.gradient)
        if step.selector_scheduler is not None:
            step.selector_scheduler.step()
        stepped = _step_optimizer(step, scaling, transaction, overflow=prepared.overflow)
        moved = stepped
        return stepped

    try:
        return step._ranks.together(advance)
    except BaseException:
        if moved and not transaction.copies_optimizer:
            step._torn = "all parameters, while another rank did not"
        raise


def _step_optimizer(
    step: StepParts, scaling: GradientScaling, transaction: Transaction, *, overflow: bool
) -> bool:
    """Step the classifier's optimizer, undone with the call where it raises; whether it stepped."""
    copies = step.atomic
    if copies is None:
        copies = state_bytes(step.optimizer) <= ATOMIC_BYTES
    versions = None
    if copies:
        transaction.save_optimizer()
    else:
        versions = Versions(step.optimizer, {p: n for n, p in step.model.named_parameters()})
    try:
        return scaling.step(step.optimizer, step._trainable, step.max_grad_norm, overflow=overflow)
    except BaseException as error:
        moved = [] if versions is None else versions.moved()
        if not moved:
            raise
        step._torn = moved[0]
        if isinstance(error, Exception):
            raise RuntimeError(torn_message(step._torn)) from error
        error.add_note(torn_message(step._torn))
        raise


def refuse_torn(moved: str) -> NoReturn:
    """Refuse to go on with parameters that have moved in part."""
    raise RuntimeError(torn_message(moved))


def torn_message(moved: str) -> str:
    return (
        f"{OP}: optimizer must be whole, got a step that raised after it had moved {moved!r} and"
        " perhaps more; load a state with load_state_dict, and build MTSStep with atomic=True to"
        " have such a step undone"
    )
