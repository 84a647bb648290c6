"""Row 6 by layer replay: every layer's input and output gradient are kept, and the layer is run
once more with v in the place of its weights. No second derivative, no differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mts_fast._isolation import RngState
from mts_fast.hypergradient.engine import Engine, Linearization, RetainedGraph
from mts_fast.hypergradient.ghost.capture import Capture, Unsupported
from mts_fast.hypergradient.ghost.linearization import FastLinearization, LeanLinearization
from mts_fast.hypergradient.ghost.probe import Layout, Probe, layout_of, probe
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.hypergradient.objective import LabelledBatch, Objective


class Ghost(Engine):
    """d_i = sum over all layer calls of <f(a_i; v), b_i>; exact where samples are independent.

    memory "fast" keeps every b from the first backward on, "low" makes them once more when v is
    known and drops each as it is used.
    """

    name = "ghost"

    def __init__(
        self, objective: Objective, parameters: Sequence[Tensor], *, memory: str = "fast"
    ) -> None:
        super().__init__(objective, parameters)
        self.memory = memory
        paths: dict[Tensor, str] = {
            p: n for n, p in objective.model.named_parameters(remove_duplicate=False)
        }
        self.names = {p: paths.get(p, f"parameter {i}") for i, p in enumerate(self.parameters)}
        self._probes: dict[Layout, Probe] = {}

    def reasons(self) -> list[str]:
        return [*coupling(self.objective.model), *_compiled(self.objective.model)]

    def linearize(
        self, batch: LabelledBatch, *, gradients: int = 2, dots: bool = True
    ) -> Linearization:
        """As for every engine.

        Raises:
            Unsupported: (a RuntimeError) with every reason that the model and this forward give.
        """
        if not dots and (gradients == 1 or self.memory == "low"):
            return RetainedGraph(self, batch, gradients)
        reasons = self.reasons()
        with Capture(self.names, len(batch)) as capture:
            graph = self.objective.losses(batch)
        recorded = capture.recorded
        reasons += capture.reasons
        reasons += [
            f"{use.path}: its layer's input was changed in place after use"
            for use in recorded
            if use.input_was_changed()
        ]
        if reasons:
            raise Unsupported(reasons)
        axes = self._axes(layout_of(recorded), batch)
        for use, axis in zip(recorded, axes, strict=True):
            if not axis.fits(use.shape, len(batch)):
                raise Unsupported([f"{use.path}: its layer's output does not hold B samples"])
        kind = LeanLinearization if self.memory == "low" else FastLinearization
        return kind(self, batch, gradients, graph, list(zip(recorded, axes, strict=True)))

    def dots_from_scratch(
        self, batch: LabelledBatch, direction: Sequence[Tensor], rng: RngState
    ) -> Tensor:
        raise AssertionError("dots need what a forward recorded")

    def _axes(self, layout: Layout, batch: LabelledBatch) -> list[SampleAxis]:
        """The sample axis of every call; an unknown layout of calls is probed."""
        found = self._probes.get(layout)
        if found is None or not found.final:
            found = probe(self.objective, self.names, batch)
            if found.layout != layout:
                raise Unsupported(["the model calls other layers for other samples"])
            self._probes[layout] = found
        return found.axes


def coupling(model: nn.Module) -> list[str]:
    """Modules that mix the samples of a batch in their present mode."""
    return [
        f"{path or 'the model'}: {type(module).__name__} in train mode mixes the samples of a batch"
        " (freeze it with .eval(), or use engine='finite_difference')"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]


def _compiled(model: nn.Module) -> list[str]:
    return [
        f"{path or 'the model'}: compiled by torch.compile, which hides the calls of its layers"
        " (pass the module as it was, or use engine='finite_difference')"
        for path, module in model.named_modules()
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        or module._compiled_call_impl is not None
    ]
