"""Stage 1 of a sampled step: one forward over all candidates without a graph.

It gives the losses, the penultimate features for the online features, and of the last linear layer
its input h and the gradient e of the loss at its output: all of the last layer's gradient, of every
candidate. The graph begins at that output, so e costs one small backward whatever the loss is.

Eval mode where it can be, as online features want it; where BatchNorm uses the batch's statistics,
the forward of all M is the one that defines and moves them, and runs in the model's modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast._check import check_finite
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.features import PenultimateFeatures
from mts_fast.hypergradient import LabelledBatch, Objective
from mts_fast.hypergradient.nests import leaves, map_tensors
from mts_fast.training.sampled.batch_statistics import CandidateStatistics, batch_norms, in_full

OP = "MTSStep"


@dataclass
class Head:
    """The last linear layer: where its parameters are among the trainable ones."""

    layer: nn.Linear
    weight: int | None  # index of the parameter; None: frozen, or made from others
    bias: int | None

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of those that are trained."""
        return tuple(i for i in (self.weight, self.bias) if i is not None)


@dataclass
class Candidates:
    """What stage 1 says of all M candidates, and of the computed ones' BatchNorm statistics."""

    losses: Tensor  # [M]
    head: Head | None  # None: no last layer serves, see `note`
    inputs: Tensor | None  # h [M, D], of the head
    errors: Tensor | None  # e [M, C], gradient of each loss at the head's output
    error_norms: Tensor | None  # [M], of e, or of the gradient at the model's output
    penultimate: Tensor | None  # [M, D] in eval mode; None: a forward of its own is needed
    statistics: CandidateStatistics
    parts: int  # micro-batches of the forward
    note: str  # why there is no control variate; "" where there is one

    @classmethod
    def none(cls, batch: LabelledBatch) -> Candidates:
        """Of a rank without any."""
        nothing = torch.zeros(0, device=batch.labels.device)
        return cls(nothing, None, None, None, nothing, None, CandidateStatistics([], 0), 0, "")

    def approximate_dots(self, direction: Sequence[Tensor]) -> Tensor | None:
        """dhat_j = e_j^T (V h_j + v_b) [M], the last layer's part of d; (V, v_b) of kappa v."""
        if self.head is None:
            return None
        assert self.errors is not None and self.inputs is not None
        output = None
        if self.head.weight is not None:
            v = direction[self.head.weight]
            output = self.inputs.to(v.dtype) @ v.T
        if self.head.bias is not None:
            v_b = direction[self.head.bias]
            output = v_b.expand(self.errors.shape) if output is None else output + v_b
        assert output is not None
        return (self.errors.to(output.dtype) * output).sum(1)

    def last_layer_gradient(self, r: Tensor) -> dict[int, Tensor]:
        """sum_j r_j e_j h_j^T and sum_j r_j e_j, by index of the parameter."""
        if self.head is None:
            return {}
        assert self.errors is not None and self.inputs is not None
        weighted = self.errors * r.to(self.errors.dtype).unsqueeze(1)
        gradients = {}
        if self.head.weight is not None:
            gradients[self.head.weight] = weighted.T @ self.inputs.to(weighted.dtype)
        if self.head.bias is not None:
            gradients[self.head.bias] = weighted.sum(0)
        return gradients


def find_head(objective: Objective, parameters: Sequence[Tensor]) -> Head | str:
    """The last nn.Linear in the order of registration; or why there is none that serves."""
    if objective.is_compiled:
        return "the model is compiled, and hooks inside it are not called"
    linear = [m for m in objective.model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        return "the model has no nn.Linear"
    module = linear[-1]
    at = {id(p): i for i, p in enumerate(parameters)}
    weight, bias = at.get(id(module.weight)), at.get(id(module.bias))
    if weight is None and bias is None:
        return "the last nn.Linear has no parameter that the optimizer trains"
    return Head(module, weight, bias)


def look(
    objective: Objective,
    batch: LabelledBatch,
    head: Head | str,
    penultimate: PenultimateFeatures | None,
    micro_batch: int | None,
    *,
    check_values: bool,
) -> Candidates:
    """Run stage 1; generators stay as they are, buffers too but where BatchNorm's move."""
    world = objective.world
    statistics = CandidateStatistics(batch_norms(world), len(batch))
    in_modes = bool(statistics.modules)
    watched = None if in_modes else penultimate
    stage = _Stage(objective, None if isinstance(head, str) else head)
    with (
        torch.no_grad(),
        preserved_rng(world),
        nullcontext() if in_modes else training_mode(world, False),
        nullcontext() if in_modes else preserved_buffers(world),
        nullcontext() if watched is None else watched.capture(),
    ):
        for part in batch.split(micro_batch):
            with statistics.recording(len(part)):
                stage.run(part)
        features = None if watched is None else watched.taken()
    losses, parts = torch.cat(stage.losses), len(stage.losses)
    if check_values:
        hint = "the training inputs or the model are broken"
        check_finite(OP, "the loss of every candidate", losses, hint)
    note = head if isinstance(head, str) else stage.note
    norms = torch.cat(stage.norms) if len(stage.norms) == len(stage.losses) else None
    if check_values and norms is not None:
        hint = "losses are finite: look for a derivative that is not (a norm or root at 0)"
        check_finite(OP, "the gradient of every candidate at the logits", norms, hint)
    if note or isinstance(head, str):
        return Candidates(losses, None, None, None, norms, features, statistics, parts, note)
    inputs, errors = torch.cat(stage.inputs), torch.cat(stage.errors)
    return Candidates(losses, head, inputs, errors, norms, features, statistics, parts, "")


@dataclass
class _Stage:
    """Forwards of the candidates' parts, and what was read of them."""

    objective: Objective
    head: Head | None
    note: str = ""
    losses: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def run(self, part: LabelledBatch) -> None:
        """One forward under no_grad, with a graph from the head's output on."""
        calls: list[tuple[Tensor, Tensor]] = []
        with self._watching(calls):
            with torch.no_grad():
                output = self.objective.forward(part.inputs)
            ends, passed = _with_ends(output)
            ends = [leaf for _, leaf in calls] + ends
            changed = [t for t in ends if not t.requires_grad]
            gradients: Sequence[Tensor | None] = ()
            try:
                for tensor in changed:
                    tensor.requires_grad_()
                with torch.enable_grad() if ends else torch.no_grad():
                    losses = self.objective.losses_of(
                        passed(), part.labels, name=part.name, whole_graph=False
                    )
                if losses.requires_grad:
                    ones = torch.ones_like(losses)
                    gradients = torch.autograd.grad(losses, ends, ones, allow_unused=True)
            finally:
                for tensor in changed:
                    tensor.requires_grad_(False)
        self.losses.append(losses.detach())
        rows = [
            in_full(g.reshape(len(part), -1))
            for g in gradients
            if g is not None and g.ndim and len(g) == len(part)
        ]
        if rows:
            self.norms.append(torch.cat(rows, 1).norm(dim=1))
        if self.head is not None and not self.note:
            self._read_head(calls, gradients, part)

    def _read_head(
        self,
        calls: list[tuple[Tensor, Tensor]],
        gradients: Sequence[Tensor | None],
        part: LabelledBatch,
    ) -> None:
        """Keep h and e of the head, or note why they do not serve."""
        if len(calls) != 1:
            self.note = f"the last nn.Linear is called {len(calls)} times in a forward"
            return
        h, e = calls[0][0], gradients[0] if gradients else None
        if h.ndim != 2 or len(h) != len(part):
            self.note = f"the last nn.Linear takes {tuple(h.shape)}, no vector per sample"
        elif e is None:
            self.note = "the losses do not depend on the last nn.Linear"
        else:
            self.inputs.append(in_full(h))
            self.errors.append(in_full(e))

    @contextmanager
    def _watching(self, calls: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside, the head's output is where the graph begins."""
        if self.head is None:
            yield
            return

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> Any:
            x = next(iter([*args, *kwargs.values()]), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                self.note = f"the last nn.Linear, a {type(module).__name__}, returns no tensor"
                return output
            torch.set_grad_enabled(True)
            leaf = output.detach().requires_grad_()
            calls.append((x.detach(), leaf))
            return leaf.clone()  # the model may write to it

        handle = self.head.layer.register_forward_hook(begin, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _with_ends(output: Any) -> tuple[list[Tensor], Callable[[], Any]]:
    """The floating-point tensors of an output that have no graph, and the output as a loss is to
    take it: of tensors in plain containers copies, since a loss may write to them."""
    in_containers = leaves(output)
    tensors = in_containers or leaves(dict(getattr(output, "__dict__", {})))
    ends = [t for t in tensors if t.is_floating_point() and t.grad_fn is None]
    if isinstance(output, Tensor) or type(output) in (tuple, list, dict):
        return ends, lambda: map_tensors(output, lambda t: t.clone())
    return ends, lambda: output
