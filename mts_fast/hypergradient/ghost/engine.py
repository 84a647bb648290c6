"""Row 6 by layer replay: every layer's input and output gradient are kept, and the layer is run
once more with v in the place of its weights. No second derivative, no differences.

One backward with the cotangent p gives the weighted gradient and, on the way, b_i p_i at each
layer's output. Then p_i d_i = <replay, b p>_i, and the gradient for other weights p' is that of b
rescaled by p'/p: one GEMM per layer, no second backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng
from mts_fast.hypergradient.engine import Engine, Linearization
from mts_fast.hypergradient.ghost.capture import Capture, Recorded, Unsupported
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis, find_axis
from mts_fast.hypergradient.objective import Objective

# largest relative gap allowed, at the first batch, between the replayed sum and the true one, as a
# multiple of the square root of the unit roundoff: rounding stays far below, a missed use of a
# parameter far above.
PROBE_TOLERANCE = 1.0


class Ghost(Engine):
    """d_i += <f(a_i; v), b_i> over all layer calls; exact where samples are independent."""

    name = "ghost"

    def __init__(self, objective: Objective, parameters: Sequence[Tensor]) -> None:
        super().__init__(objective, parameters)
        paths = {id(p): n for n, p in objective.model.named_parameters(remove_duplicate=False)}
        self.names = {
            id(p): paths.get(id(p), f"parameter {i}") for i, p in enumerate(self.parameters)
        }
        # layout of the calls -> sample axis of each, found at the first batch of that layout
        self.axes: dict[tuple, list[SampleAxis]] = {}

    def reasons(self) -> list[str]:
        return []

    def linearize(self, inputs: Any, labels: Tensor) -> Linearization:
        return GhostLinearization(self, inputs, labels)

    def dots(
        self,
        inputs: Any,
        labels: Tensor,
        direction: Sequence[Tensor],
        *,
        rng: RngState | None = None,
    ) -> Tensor:
        model = self.objective.model
        with preserved_rng(model, rng), preserved_buffers(model):
            return self.linearize(inputs, labels).dots(direction)


class GhostLinearization(Linearization):
    """One captured forward; `gradient` and `dots` read it."""

    def __init__(self, engine: Ghost, inputs: Any, labels: Tensor) -> None:
        self.engine = engine
        self.batch_size = len(labels)
        with Capture(engine.names, self.batch_size) as capture:
            graph = engine.objective.losses(inputs, labels)
        if capture.reasons:
            raise Unsupported(sorted(set(capture.reasons)))
        self.losses = graph.detach()
        self._graph: Tensor | None = graph
        self._capture = capture
        self._recorded = capture.recorded
        self._copied = {id(r.tracked["value"]) for r in self._recorded if r.call is None}
        self._p: Tensor | None = None  # the cotangent that _b was made with
        self._b: list[Tensor | None] = []
        self._axes = self._sample_axes()

    def gradient(self, p: Tensor, *, last: bool = False) -> list[Tensor | None]:
        p = p.to(self.losses.dtype)
        if self._p is None:
            return self._backward(p)
        # p'/p; where p is 0 the sample has no say in either
        ratio = torch.where(self._p > 0, p / self._p, torch.zeros_like(p))
        found = self._weight_gradients([self._scaled(i, ratio) for i in range(len(self._recorded))])
        if last:
            self._release()
        return found

    def dots(self, direction: Sequence[Tensor]) -> Tensor:
        if self._p is None:
            self._backward(torch.ones_like(self.losses), weights=False)
        assert self._p is not None
        tangents = {id(p): v for p, v in zip(self.engine.parameters, direction, strict=True)}
        total = torch.zeros_like(self.losses)  # [B], p_i d_i
        with torch.no_grad():
            for recorded, axis, b in zip(self._recorded, self._axes, self._b, strict=True):
                if b is not None:
                    tangent = self._output_tangent(recorded, tangents)
                    total += _dot(tangent, b, axis, self.batch_size).to(total.dtype)
        return torch.where(self._p > 0, total / self._p, torch.zeros_like(total))

    def _backward(self, p: Tensor, *, weights: bool = True) -> list[Tensor | None]:
        """One backward with the cotangent p; keeps b p of every call and frees the graph."""
        graph, self._graph = self._graph, None
        if graph is None:
            fail(RuntimeError, "MTSStep", "the linearization", "used once per batch", "its end")
        leaves = self.engine.parameters if weights else []
        edges = [r.output for r in self._recorded]
        found = torch.autograd.grad(graph, [*leaves, *edges], p, allow_unused=True)
        self._p = p
        self._b = list(found[len(leaves) :])
        for recorded in self._recorded:
            recorded.output = None  # the graph goes with its edges
        gradients: list[Tensor | None] = list(found[: len(leaves)])
        if weights:
            self._add_copied(gradients)
        return gradients

    def _add_copied(self, gradients: list[Tensor | None]) -> None:
        """Gradients of parameters that entered the graph as one copy per sample."""
        if not self._copied:
            return
        position = {id(p): i for i, p in enumerate(self.engine.parameters)}
        for recorded, b in zip(self._recorded, self._b, strict=True):
            if recorded.call is None and b is not None:
                for parameter, g in self._to_parameters(recorded, {"value": _summed(recorded, b)}):
                    i = position[id(parameter)]
                    old = gradients[i]
                    gradients[i] = g if old is None else old + g

    def _weight_gradients(self, b: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradient of every parameter by book-keeping, for given output cotangents."""
        total: dict[int, Tensor] = {}
        for recorded, cotangent in zip(self._recorded, b, strict=True):
            if cotangent is None:
                continue
            if recorded.call is None:
                found = {"value": _summed(recorded, cotangent)}
            else:
                found = recorded.call.weight_gradients(cotangent)
            for parameter, g in self._to_parameters(recorded, found):
                g = g.to(parameter.dtype)
                key = id(parameter)
                total[key] = total[key] + g if key in total else g
        return [total.get(id(p)) for p in self.engine.parameters]

    def _to_parameters(
        self, recorded: Recorded, found: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Gradients of tracked tensors carried through their views to the parameters."""
        pairs = []
        for name, g in found.items():
            tensor = recorded.tracked[name]
            while id(tensor) in self._capture.views:
                view = self._capture.views[id(tensor)]
                with torch.enable_grad():
                    leaf = view.source.detach().requires_grad_()
                    image = view.apply(leaf)
                (g,) = torch.autograd.grad(image, leaf, g.to(image.dtype))
                tensor = view.source
            pairs.append((tensor, g))
        return pairs

    def _tangent_of(self, tensor: Tensor, tangents: dict[int, Tensor]) -> Tensor:
        view = self._capture.views.get(id(tensor))
        if view is None:
            return tangents[id(tensor)]
        return view.apply(self._tangent_of(view.source, tangents))

    def _output_tangent(self, recorded: Recorded, tangents: dict[int, Tensor]) -> Tensor:
        own = {n: self._tangent_of(t, tangents) for n, t in recorded.tracked.items()}
        if recorded.call is None:
            return own["value"]
        tensor, version = recorded.input_version or (None, 0)
        if tensor is not None and tensor._version != version:
            path = self.engine.names.get(id(next(iter(recorded.tracked.values()))), "a layer")
            raise Unsupported([f"the input of {path} was changed in place after its use"])
        return recorded.call.replay(own)

    def _scaled(self, i: int, ratio: Tensor) -> Tensor | None:
        b = self._b[i]
        return None if b is None else b * self._axes[i].expand(ratio, b)

    def _release(self) -> None:
        self._recorded, self._b, self._axes = [], [], []

    def _sample_axes(self) -> list[SampleAxis]:
        """The sample axis of every call; a new layout of calls is probed by backward passes."""
        layout = tuple(
            (r.call.rule.function if r.call else None, len(r.shape), *map(id, r.tracked.values()))
            if not self._capture.views
            else (r.call.rule.function if r.call else None, len(r.shape))
            for r in self._recorded
        )
        if layout not in self.engine.axes:
            self.engine.axes[layout] = self._probe()
        return self.engine.axes[layout]

    def _probe(self) -> list[SampleAxis]:
        """Find axes from the first and the last sample alone, then check the sum over all."""
        assert self._graph is not None
        edges = [r.output for r in self._recorded]
        samples = sorted({0, self.batch_size - 1})
        singles = []
        for k in samples:
            one = torch.zeros_like(self.losses)
            one[k] = 1
            singles.append(
                torch.autograd.grad(self._graph, edges, one, retain_graph=True, allow_unused=True)
            )
        axes, reasons = [], []
        for i, recorded in enumerate(self._recorded):
            b = [s[i] for s in singles]
            present = [(x, k) for x, k in zip(b, samples, strict=True) if x is not None]
            axis: SampleAxis | None = SampleAxis()
            if present:
                rows, owners = zip(*present, strict=True)
                axis = find_axis(rows, owners, self.batch_size)
            if axis is None:
                tracked = next(iter(recorded.tracked.values()))
                path = self._capture._path(tracked)
                reasons.append(f"{path}: samples are mixed in, or after, the layer that uses it")
            axes.append(axis or SampleAxis())
        if reasons:
            raise Unsupported(reasons)
        self._check_sum(edges)
        return axes

    def _check_sum(self, edges: list) -> None:
        """Book-kept gradients must equal autograd's: finds uses that the capture did not see."""
        assert self._graph is not None
        parameters = self.engine.parameters
        ones = torch.ones_like(self.losses)
        found = torch.autograd.grad(
            self._graph, [*parameters, *edges], ones, retain_graph=True, allow_unused=True
        )
        truth: list[Tensor | None] = list(found[: len(parameters)])
        self._b = list(found[len(parameters) :])
        self._add_copied(truth)
        kept = self._weight_gradients(self._b)
        self._b = []
        reasons = []
        for parameter, true, ours in zip(parameters, truth, kept, strict=True):
            path = self.engine.names[id(parameter)]
            if true is None and ours is None:
                continue
            if true is None or ours is None:
                reasons.append(f"{path} is used in a way that was not seen")
                continue
            gap = (true - ours).norm() / true.norm().clamp(min=torch.finfo(true.dtype).tiny)
            lowest = min((b.dtype for b in found[len(parameters) :] if b is not None), key=_bits)
            if gap > PROBE_TOLERANCE * torch.finfo(lowest).eps ** 0.5:
                reasons.append(
                    f"{path}: its recorded uses give a gradient that is off by {gap:.1e}"
                )
        if reasons:
            raise Unsupported(reasons)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _summed(recorded: Recorded, b: Tensor) -> Tensor:
    """A per-sample copy's gradient summed to the shape of the tracked tensor."""
    tracked = recorded.tracked["value"]
    if b.ndim == tracked.ndim:
        return b.sum(0, keepdim=True)
    return b.sum(list(range(b.ndim - tracked.ndim)))


def _dot(tangent: Tensor, b: Tensor, axis: SampleAxis, batch_size: int) -> Tensor:
    """<tangent, b> per sample [B], accumulated in float32 or wider."""
    if tangent.dtype in (torch.bfloat16, torch.float16) or tangent.dtype != b.dtype:
        tangent, b = tangent.float(), b.float()
    left, right = axis.rows(tangent.expand_as(b), batch_size), axis.rows(b, batch_size)
    return torch.linalg.vecdot(left, right)
