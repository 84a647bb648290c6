"""Row 6 by layer replay: every layer's input and output gradient are kept, and the layer is run
once more with v in the place of its weights. No second derivative, no differences."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor, nn

from mts_fast._isolation import RngState, restored_on_error
from mts_fast.hypergradient.engine import Engine, Linearization, RetainedGraph
from mts_fast.hypergradient.ghost.capture import Capture, Unsupported
from mts_fast.hypergradient.ghost.linearization import (
    FastLinearization,
    GhostLinearization,
    LeanLinearization,
)
from mts_fast.hypergradient.ghost.probe import Layout, Probe, layout_of, probe
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
        paths: dict[Tensor, str] = {p: n for n, p in objective.model.named_parameters()}
        self.names = {p: paths.get(p, f"parameter {i}") for i, p in enumerate(self.parameters)}
        self._probes: dict[Layout, Probe] = {}
        self._shared_rows: list[bool] = []

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
        # a probe leaves no trace, but whoever listens to the model's forwards hears it: it comes
        # before the forward that counts, which is the last one
        finals = [found.final for found in self._probes.values()]
        if not reasons and not (finals and all(finals)):
            self._probe(batch)
        try:
            with restored_on_error(self.objective.model):
                return self._captured(batch, gradients, reasons)
        except _UnknownLayout:
            self._probe(batch)
        return self._captured(batch, gradients, reasons)

    def _captured(
        self, batch: LabelledBatch, gradients: int, reasons: list[str]
    ) -> GhostLinearization:
        with Capture(self.names, len(batch), self._shared_rows) as capture:
            graph = self.objective.losses(batch)
        recorded = capture.recorded
        reasons = [*reasons, *capture.reasons]
        reasons += [
            f"{use.path}: its layer's input was changed in place after use"
            for use in recorded
            if use.input_was_changed()
        ]
        if reasons:
            raise Unsupported(reasons)
        layout = layout_of(recorded)
        if layout not in self._probes:
            raise _UnknownLayout(["the model calls other layers for other samples"])
        uses = list(zip(recorded, self._probes[layout].axes, strict=True))
        for use, axis in uses:
            if not axis.fits(use.shape, len(batch)):
                raise Unsupported([f"{use.path}: its layer's output does not hold B samples"])
        # dots alone need no b twice
        if self.memory == "low" or not gradients:
            return LeanLinearization(self, batch, gradients, graph, uses)
        return FastLinearization(self, batch, gradients, graph, uses)

    def _probe(self, batch: LabelledBatch) -> None:
        found = probe(self.objective, self.names, batch)
        self._probes[found.layout] = found
        self._shared_rows = found.shared_rows

    def dots_from_scratch(
        self, batch: LabelledBatch, direction: Sequence[Tensor], rng: RngState
    ) -> Tensor:
        raise AssertionError("dots need what a forward recorded")


class _UnknownLayout(Unsupported):
    """A sequence of layer calls that has not been probed."""


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
    # where dynamo was never imported, nothing is wrapped; importing it here would take seconds
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    wrapper = () if dynamo is None else dynamo.OptimizedModule
    return [
        f"{path or 'the model'}: compiled by torch.compile, which hides the calls of its layers"
        " (pass the module as it was, or use engine='finite_difference')"
        for path, module in model.named_modules()
        if isinstance(module, wrapper) or module._compiled_call_impl is not None
    ]
