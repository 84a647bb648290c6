"""The function that engines differentiate: model and loss, giving one loss per sample."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import check_integer, check_range, describe, fail
from mts_fast._isolation import Restoring, World, all_modules, replaced_parameters
from mts_fast._sharding import Sharding
from mts_fast.hypergradient.nests import leaves, map_tensors
from mts_fast.hypergradient.refused import Refused

# (model output, labels) -> per-sample losses [B]
Loss = Callable[[Any, Tensor], Tensor]
# the label that torch's cross-entropy leaves out
IGNORED = -100
# losses whose derivative by the logits is as small as they are where these are right
LOGARITHMIC = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.MultiLabelSoftMarginLoss,
)
# torch's name for the autograd node of re-entrant activation checkpointing
REENTRANT = "CheckpointFunctionBackward"
REENTRANT_REASON = "re-entrant activation checkpointing, which drops gradients there"


@dataclass(frozen=True)
class LabelledBatch:
    """Inputs and labels of B samples, first axis B everywhere.

    inputs: one tensor, a tuple or list (`model(*inputs)`), or a mapping (`model(**inputs)`).
    name: the name of the caller's argument for the labels.
    """

    inputs: Any
    labels: Tensor
    name: str = field(default="labels", kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return leaves(self.inputs)

    def around_forward(self) -> AbstractContextManager[object]:
        """Entered around every forward that computes losses of this batch."""
        return contextlib.nullcontext()

    def split(self, size: int | None) -> list[LabelledBatch]:
        """Views of at most `size` samples each, in order; the whole batch for None."""
        if size is None or size >= len(self):
            return [self]
        return [self.at(slice(i, i + size)) for i in range(0, len(self), size)]

    def at(self, samples: slice | Tensor) -> LabelledBatch:
        """Some of the samples."""

        def part(t: Tensor) -> Tensor:
            if not t.ndim:
                return t
            # sparse tensors take no tensor as index
            return t.index_select(0, samples) if isinstance(samples, Tensor) else t[samples]

        inputs = map_tensors(self.inputs, part)
        return LabelledBatch(inputs, self.labels[samples], name=self.name)


class Objective:
    """Per-sample losses of a model.

    Without `loss` the output must be logits [B, C] or [B, T, C], or carry them as `.logits` or
    `["logits"]`, and the loss is the cross-entropy. A loss that is a module, or a method of one,
    belongs to `world` with its buffers and mode.

    The caller's tensors are never written to: the first forward of every kind gets copies, and
    where the model or the loss wrote into them, so does every later one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        op: str = "MTSStep",
        sharding: Sharding | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.op = op  # as errors name the caller
        inside = set(model.modules())
        self.world = World(model, *(m for m in _modules_of(loss) if m not in inside))
        # where the model is sharded, parameters are shards in all that is said of them
        self.sharding = Sharding.of(op, model) if sharding is None else sharding
        # modes and grad mode -> whether the arguments of a forward are written to
        self._writes: dict[object, bool] = {}
        self._inspected: set[object] = set()

    def tensors_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that stand for parameters: themselves, or their shards here."""
        return list(parameters) if self.sharding is None else self.sharding.local(parameters)

    @property
    def gradients_of_a_graph(self) -> float:
        """How many gradients one forward gives, beside dots; for others it is run again."""
        if self.sharding is not None:
            return 0
        return 1 if self.is_compiled else math.inf

    def gradients(
        self,
        outputs: Tensor,
        parameters: Sequence[Tensor],
        cotangent: Tensor | None = None,
        *,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """J^T cotangent per parameter, None where the outputs do not depend on it; of a sharded
        model summed over ranks."""
        if self.sharding is not None:
            return self.sharding.gradients(parameters, outputs, cotangent)
        return list(
            torch.autograd.grad(
                outputs, parameters, cotangent, retain_graph=retain_graph, allow_unused=True
            )
        )

    def replaced(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Restoring:
        """Inside, the parameters have other values."""
        written = None if self.sharding is None else self.sharding.reshard
        return replaced_parameters(parameters, values, written)

    def with_model(self, model: nn.Module) -> Objective:
        """The same of a stand-in for the model, which writes to what the model writes to."""
        other = copy.copy(self)
        other.model = model
        return other

    def forward(self, inputs: Any) -> Any:
        """The model's output, in whatever mode it is in."""
        if torch.is_grad_enabled():
            # after a forward without gradients the cache may hold casts that have no graph
            torch.clear_autocast_cache()
        if self.sharding is None:
            return self._on_copies("inputs", self._call, inputs)
        self.sharding.in_pass = True  # until its backward ends, where there will be one
        output = self._on_copies("inputs", self._call, inputs)
        self.sharding.in_pass = torch.is_grad_enabled()
        return output

    def losses(self, batch: LabelledBatch) -> Tensor:
        """Per-sample losses [B]."""
        with batch.around_forward():
            return self.losses_of(self.forward(batch.inputs), batch.labels, name=batch.name)

    def losses_of(
        self, output: Any, labels: Tensor, *, name: str = "labels", whole_graph: bool = True
    ) -> Tensor:
        """Per-sample losses [B] of an output that is already there; `whole_graph`: its graph, where
        it has one, reaches back to the parameters."""
        if self.loss is None:
            logits = self.logits_of(output)
            self._check_labels(logits, labels, name)
            return self._with_graph(ops.cross_entropy(logits, labels), whole_graph)
        loss = self.loss
        losses = self._on_copies("labels", lambda targets: loss(output, targets), labels)
        size = labels.shape[0]
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            got = describe(losses)
            hint = "return one loss per sample, for example with reduction='none'"
            if isinstance(losses, Tensor) and losses.ndim > 1 and len(losses) == size:
                hint = "reduce it, for example with .flatten(1).mean(1)"
            expected = f"a tensor of shape ({size},), one loss per sample"
            self._fail(ValueError, expected, got, hint)
        if not losses.is_floating_point():
            hint = "return floating-point losses that depend on the output"
            self._fail(TypeError, "floating-point", describe(losses), hint)
        return self._with_graph(losses, whole_graph)

    def logits_of(self, output: Any) -> Tensor:
        """The logits in a model's output."""
        if isinstance(output, Mapping):
            output = output.get("logits", output)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            hint = "pass loss= to say what your model's output means"
            fail(TypeError, self.op, "the model's output", "logits", describe(output), hint)
        return output

    def _check_labels(self, logits: Tensor, labels: Tensor, name: str) -> None:
        """Classes that fit the logits, with the names that the caller knows."""
        if logits.ndim not in (2, 3) or logits.shape[0] != labels.shape[0]:
            expected = f"logits [{labels.shape[0]}, C] or [{labels.shape[0]}, T, C]"
            hint = "pass loss= to say what your model's output means"
            fail(ValueError, self.op, "the model's output", expected, describe(logits), hint)
        check_integer(self.op, name, labels)
        if labels.shape != logits.shape[:-1]:
            expected = f"of shape {tuple(logits.shape[:-1])}, class indices"
            hint = "pass indices (one-hot: .argmax(-1)), or loss= for other labels"
            fail(ValueError, self.op, name, expected, describe(labels), hint)
        if not labels.is_cuda and not torch.compiler.is_compiling():
            classes = logits.shape[-1]
            hint = f"the logits have {classes} classes; -100 counts nothing"
            used = labels.long()
            check_range(self.op, name, used[used != IGNORED], 0, classes, hint)

    @property
    def is_logarithmic(self) -> bool:
        """Whether the loss is known to be a cross-entropy or the like."""
        return self.loss is None or isinstance(self.loss, LOGARITHMIC)

    def kind(self, inputs: Any, *, single: bool = True) -> tuple[object, ...]:
        """What distinguishes forwards: modes, autocast, and how the inputs are nested; `single`:
        and whether there is but one sample."""
        return (
            self.world.modes(),
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
            _structure(inputs, single),
        )

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile runs the model or a part of it."""
        return bool(self.compiled_modules())

    def compiled_modules(self) -> list[str]:
        """Paths of the modules that torch.compile runs."""
        # where dynamo was never imported, nothing is wrapped; importing it here would take seconds
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        wrapper = () if dynamo is None else dynamo.OptimizedModule

        def compiled(module: nn.Module) -> bool:
            return isinstance(module, wrapper) or module._compiled_call_impl is not None

        return [path or "the model" for path, _ in self.modules_that(compiled)]

    def modules_that(self, condition: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
        """The model's modules that meet a condition, with their paths."""
        # paths cost more than modules, and are seldom asked for
        if not any(map(condition, all_modules([self.model]))):
            return []
        return [(path, m) for path, m in self.model.named_modules() if condition(m)]

    def _call(self, inputs: Any) -> Any:
        try:
            if isinstance(inputs, Mapping):
                return self.model(**inputs)
            if isinstance(inputs, tuple | list):
                return self.model(*inputs)
            return self.model(inputs)
        except RuntimeError as error:
            if torch.is_grad_enabled() or "does not require grad" not in str(error):
                raise
            hint = "decorate its forward with torch.enable_grad()"
            got = "a model that calls autograd inside its forward"
            expected = "able to run under torch.no_grad()"
            message = f"{self.op}: model must be {expected}, got {got} ({error}); {hint}"
            raise RuntimeError(message) from error

    def _on_copies(self, arg: str, run: Callable[[Any], Any], nest: Any) -> Any:
        """Run on the caller's tensors, on copies the first time and where they are written to."""
        if torch.compiler.is_compiling():
            return run(nest)
        kind = arg, self.world.modes(), torch.is_grad_enabled()
        writes = self._writes.get(kind)
        if writes is False:
            versions = [t._version for t in leaves(nest) if not t.is_inference()]
            result = run(nest)
            if versions != [t._version for t in leaves(nest) if not t.is_inference()]:
                hint = "clone what forward writes to; this batch holds written values now"
                got = "a model or loss that wrote into it, after forwards that did not"
                fail(RuntimeError, self.op, arg, "left as they are by the model", got, hint)
            return result
        copies = map_tensors(nest, torch.clone)
        result = run(copies)
        if writes is None:
            self._writes[kind] = _differ(leaves(copies), leaves(nest))
        return result

    def _with_graph(self, losses: Tensor, whole: bool) -> Tensor:
        """Losses whose graph can be differentiated."""
        if not torch.is_grad_enabled():
            return losses
        if not whole and not losses.requires_grad:
            return losses
        if not losses.requires_grad:
            hint = "do not detach the output, and return losses made from it"
            got = "losses without a graph"
            self._fail(ValueError, "dependent on trainable parameters", got, hint)
        kind = self.world.modes()
        if whole and kind not in self._inspected:
            if _has_node(losses, REENTRANT):
                raise Refused(
                    "every engine",
                    [REENTRANT_REASON],
                    final=True,
                    message=(
                        f"{self.op}: model must be differentiable by torch.autograd.grad, got"
                        f" {REENTRANT_REASON}; pass use_reentrant=False to torch.utils.checkpoint"
                    ),
                )
            self._inspected.add(kind)
        return losses

    def _fail(self, error: type[Exception], expected: str, got: str, hint: str) -> None:
        argument = "loss(output, labels)" if self.loss is not None else "the model's output"
        fail(error, self.op, argument, expected, got, hint)


def _modules_of(loss: Loss | None) -> list[nn.Module]:
    """The modules that a loss is, is a method of, or carries as arguments or in its closure."""
    candidates: list[Any] = []
    while isinstance(loss, functools.partial):
        candidates += [*loss.args, *loss.keywords.values()]
        loss = loss.func
    candidates += [loss, getattr(loss, "__self__", None)]
    # what a function closes over, as a lambda does
    for cell in getattr(loss, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # one that is not filled yet
            candidates.append(cell.cell_contents)
    modules = [m for m in candidates if isinstance(m, nn.Module)]
    return list(dict.fromkeys(modules))


def _structure(nest: Any, single: bool) -> object:
    """Nesting, dtypes and numbers of axes; sizes vary from batch to batch."""
    if isinstance(nest, Tensor):
        return str(nest.dtype), nest.ndim, single and nest.ndim > 0 and len(nest) == 1
    if isinstance(nest, Mapping):
        return tuple((str(name), _structure(value, single)) for name, value in nest.items())
    if isinstance(nest, tuple | list):
        return tuple(_structure(value, single) for value in nest)
    return type(nest).__name__


def _differ(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> bool:
    """Whether something wrote into the copies, through `.data` too."""
    return any(c._version > 0 for c in copies if not c.is_inference()) or not all(
        c.layout != torch.strided or torch.equal(c, t)
        for c, t in zip(copies, originals, strict=True)
    )


def _has_node(tensor: Tensor, name: str) -> bool:
    """Whether a graph holds an autograd node of that name."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == name:
            return True
        todo += [following for following, _ in node.next_functions]
    return False
