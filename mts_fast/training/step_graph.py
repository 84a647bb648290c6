"""A whole step as one CUDA graph: its hundreds of launches become one replay.

What a small model pays is the host: Python and launches, a multiple of the device's time. A step
whose shapes and memory stay the same is recorded once and then replayed: rows 1 to 9 and both
optimizers' steps. Calls that check the engine (1, 2, 4, 8, ...), and calls that a recording cannot
hold, run as without it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree as pytree

from mts_fast._check import fail
from mts_fast._columns import devices_of
from mts_fast._isolation import RngState, World, without_device_generators
from mts_fast.backends.precision import allows_tf32
from mts_fast.hypergradient.double_backward import DoubleBackward
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.ops import current_backend
from mts_fast.training.batch_run import Run as BatchRun
from mts_fast.training.call import Call
from mts_fast.training.capturing import (
    DEVICE_TYPES,
    EAGER_CALLS,
    CudaRecorder,
    Recorder,
    autocast_without_cache,
    memory_of,
)
from mts_fast.training.result import StepResult
from mts_fast.training.step_parts import StepParts

logger = logging.getLogger("mts_fast")

OP = "MTSStep"
# takes a step; returns its result and the largest gap of right dots
Run = Callable[[Call], tuple[StepResult, Tensor | None]]

# recordings of one shape that are made because what they hold has changed, before it is given up
MOST_RECORDINGS = 3
# recordings that are kept; the oldest goes
MOST_KEPT = 8
# what may stand among the tensors of the inputs
PLAIN = (bool, int, float, str, type(None))
# engines that ask the kept graph of the training forward, and run no forward again
FORWARD_ONCE = (Ghost.name, DoubleBackward.name)


@dataclass
class Recording:
    """A recorded step."""

    memory: object  # what it holds beside its inputs
    inputs: list[Tensor]
    result: StepResult
    allowed: Tensor | None  # see `Prepared`
    gradients: list[tuple[Tensor, Tensor | None]]  # of the parameters of both optimizers
    replay: Callable[[], object]


@dataclass(frozen=True)
class Kind:
    """A call with what decides whether it is recorded."""

    key: object  # calls of equal key share a recording
    call: Call
    tensors: list[Tensor]
    unseen: list[str]  # classes of inputs whose tensors are not among them
    engine: str


class StepGraph:
    """The recordings of an `MTSStep`, by the shapes and the kind of a call."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._eager: dict[object, int] = defaultdict(int)
        self._made: dict[object, int] = defaultdict(int)
        self._recorded: dict[object, Recording] = {}
        self._refused: dict[object, str] = {}
        self._said: set[str] = set()
        # whether calls of this kind moved generators of the host, of a device, and of a device in
        # the selector's forward
        self._draws: dict[object, tuple[bool, bool, bool]] = {}

    @classmethod
    def of(
        cls, optimizer: torch.optim.Optimizer, selector_optimizer: torch.optim.Optimizer
    ) -> StepGraph:
        """The recordings of a step with these optimizers.

        Raises:
            RuntimeError: a module that is not on a GPU.
            ValueError: an optimizer that counts its steps, or reads values, on the host.
        """
        recorder = CudaRecorder()
        recorder.check("optimizer", optimizer)
        recorder.check("selector_optimizer", selector_optimizer)
        return cls(recorder)

    @staticmethod
    def kind_of(step: StepParts, call: Call, layout: str) -> Kind:
        """What the call is for the graphs; asked once a call."""
        tensors, structure, unseen = _flattened(call)
        engine = step._engines.engine_for(layout).name
        casts = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in DEVICE_TYPES]
        key = (
            tuple((t.shape, t.dtype, t.device, t.stride()) for t in tensors),
            structure,
            (call.updates_selector, call.weighted, call.schedule),
            (layout, engine, step._world.modes(), tuple(casts)),
        )
        return Kind(key, call, tensors, unseen, engine)

    def reasons(self, step: StepParts, kind: Kind) -> list[str]:
        """Why this call cannot be recorded; empty where it can."""
        call, engine = kind.call, kind.engine
        on_host, draws, scores_draw = self._draws.get(kind.key, (False, False, False))
        forward_once = engine in FORWARD_ONCE and step._micro_batch is None
        reasons = {
            "several ranks take the step": step._ranks.size > 1,
            "its values are checked (check=)": call.check_values,
            "it computes a part of its batch (compute=)": call.computed is not None,
            "its losses are scaled (scaler=)": step.scaler is not None,
            "track_gsnr= draws and reads": step.track_gsnr,
            "the model is compiled": step._objective.is_compiled,
            "the call and the modules are not on one device": len(_devices(step, kind)) > 1,
            f"inputs hold {kind.unseen[:1]}, whose tensors are not seen": bool(kind.unseen),
            "a forward draws random numbers on the host": on_host,
            "a forward writes to parameters": bool(step._world.written),
            f"engine {engine!r} runs the forward again, which draws random numbers": draws
            and not forward_once,
            "the validation forward draws random numbers": draws
            and step.validation_mode == "train",
            "the selector draws random numbers, in row 1 and again in row 9": scores_draw,
            "the selector's batch draws random numbers": draws and call.selector_batch is not None,
            "an optimizer has hooks": _has_hooks(step.optimizer, step.selector_optimizer),
            self._refused.get(kind.key, ""): kind.key in self._refused,
        }
        return [why for why, holds in reasons.items() if holds]

    def replays(self, step: StepParts, kind: Kind) -> bool:
        """Whether the call is to be replayed; the reason why not is logged once."""
        if self._eager[kind.key] < EAGER_CALLS:
            return False
        recording = self._recorded.get(kind.key)
        if recording is not None and recording.memory != _memory(step):
            # state that is new is made by calls without a graph: made within one, it would be made
            # again in every replay
            del self._recorded[kind.key]
            self._eager[kind.key] = 0
            return False
        reasons = self.reasons(step, kind)
        if reasons and reasons[0] not in self._said:
            logger.warning("MTSStep: cuda_graph='step' runs without a graph: %s", reasons[0])
            self._said.add(reasons[0])
        return not reasons

    def ran(
        self, step: StepParts, call: Call, layout: str, before: RngState, batch: BatchRun
    ) -> None:
        """A call has run without a graph, from these generators."""
        # the engine may be another one than when the call began
        key = self.kind_of(step, call, layout).key
        self._eager[key] += 1
        moved = RngState.capture(step._world).moved_since(before)
        _, scored = batch.after_scoring.moved_since(batch.before_scoring)
        known = self._draws.get(key, (False, False, False))
        self._draws[key] = known[0] or moved[0], known[1] or moved[1], known[2] or scored

    def needs_recording(self, kind: Kind) -> bool:
        """Whether there is no recording of such a call."""
        return kind.key not in self._recorded

    def record(self, step: StepParts, kind: Kind, run: Run) -> None:
        """Record the step without taking it; `run(call)` would take it.

        Raises:
            RuntimeError: by torch, where the step waits for the device or is otherwise unfit; or
                after MOST_RECORDINGS.
        """
        memory = _memory(step)
        self._made[kind.key] += 1
        if self._made[kind.key] > MOST_RECORDINGS:
            got = f"the {self._made[kind.key]}th recording of one kind of call"
            hint = "keep learning rates that a scheduler moves in tensors on the GPU"
            fail(RuntimeError, OP, "what a graph holds", "the same in every call", got, hint)
        static = [t.detach().clone(memory_format=torch.preserve_format) for t in kind.tensors]
        captured: list[tuple[StepResult, Tensor | None]] = []

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            with autocast_without_cache(inputs[0].device.type), without_device_generators():
                captured.append(run(_with_tensors(kind.call, list(inputs))))
            return ()

        replay = self._recorder.record(function, static)
        result, allowed = captured[-1]
        if _memory(step) != memory:
            # the recording reads the tensor that was there, and writes to another
            hint = "write into buffers in place"
            got = "a forward or a step that puts a new tensor in its place"
            fail(RuntimeError, OP, "a buffer or a state", "written in place", got, hint)
        groups = step.optimizer.param_groups + step.selector_optimizer.param_groups
        gradients = [(p, p.grad) for group in groups for p in group["params"]]
        while len(self._recorded) >= MOST_KEPT:  # each holds the memory of a whole step
            del self._recorded[next(iter(self._recorded))]
        recording = Recording(memory, static, result, allowed, gradients, replay)
        self._recorded[kind.key] = recording

    def replay(self, kind: Kind) -> tuple[StepResult, Tensor | None]:
        """Take the step by its recording: the result, and the largest gap of right dots."""
        recording = self._recorded[kind.key]
        for static, tensor in zip(recording.inputs, kind.tensors, strict=True):
            static.copy_(tensor.detach())
        recording.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        allowed = recording.allowed
        return detached_copy(recording.result), None if allowed is None else allowed.clone()

    def refuse(self, kind: Kind, error: Exception) -> None:
        """A recording has failed: this kind of call is not recorded again."""
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self._refused[kind.key] = why


def detached_copy(result: StepResult) -> StepResult:
    """A result in memory of its own: the next replay overwrites that of the recording."""
    tensors: dict[str, Any] = {
        f.name: value.clone()
        for f in fields(result)
        if isinstance(value := getattr(result, f.name), Tensor)
    }
    return replace(result, **tensors)


def _flattened(call: Call) -> tuple[list[Tensor], object, list[str]]:
    """All tensors of a call; what stands between them; and classes whose tensors are not seen."""
    leaves, structure = pytree.tree_flatten(_parts(call))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    plain = tuple(leaf for leaf in others if isinstance(leaf, PLAIN))
    unseen = [type(leaf).__name__ for leaf in others if not isinstance(leaf, PLAIN)]
    return tensors, (structure, plain), unseen


def _devices(step: StepParts, kind: Kind) -> set[torch.device]:
    """Where the tensors of a call and of its modules are."""
    world: World = step._world
    return devices_of([*kind.tensors, *world.parameters(), *world.buffers()])


def _with_tensors(call: Call, tensors: list[Tensor]) -> Call:
    """The call with other tensors."""
    leaves, structure = pytree.tree_flatten(_parts(call))
    remaining = iter(tensors)
    leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    parts = pytree.tree_unflatten(leaves, structure)
    return replace(
        call,
        **{name: replace(getattr(call, name), **values) for name, values in parts.items()},
    )


def _parts(call: Call) -> dict[str, dict[str, Any]]:
    """The batches of a call as nested dicts."""
    batches = {
        "batch": call.batch,
        "selector_batch": call.selector_batch,
        "validation": call.validation,
    }
    return {
        name: {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "shard"}
        for name, batch in batches.items()
        if batch is not None
    }


def _memory(step: StepParts) -> object:
    """Addresses and numbers that a recording holds."""
    world: World = step._world
    tensors: list[Tensor | None] = [*world.parameters(), *world.buffers(), step.class_weight]
    numbers = []
    for optimizer in (step.optimizer, step.selector_optimizer):
        states, group_options = memory_of(optimizer)
        tensors += states
        numbers.append(group_options)
    tensors += step._features.tensors()
    trainable = [p.requires_grad for p in world.parameters()]
    # attributes of the step that may be set between calls; others are in the key
    options = (
        *(step.hypergradient_lr, step.max_grad_norm, step.validation_mode, step.val_objective),
        *(step.clip_virtual_step, step.candidate_dtype, current_backend(), allows_tf32()),
        *map(id, world.modules),
    )
    return [0 if t is None else t.data_ptr() for t in tensors], numbers, trainable, options


def _has_hooks(*optimizers: torch.optim.Optimizer) -> bool:
    """Whether someone's own code runs with their steps; a replay would leave it out."""
    hooks: Sequence[str] = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    return bool(everywhere) or any(getattr(o, name, None) for o in optimizers for name in hooks)
