"""One call's part of row 6: the layer replayed with v, dotted with the output gradient b."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mts_fast.hypergradient.ghost.recorded import Recorded
from mts_fast.hypergradient.ghost.rules import LayerCall, convolution_options
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.ops import kernel_for


def call_dots(
    use: Recorded, axis: SampleAxis, b: Tensor, tangents: Mapping[int, Tensor], size: int
) -> Tensor:
    """<replay, b> per sample [B] for tangents of the parameters, given by id.

    Where a kernel is in force, linear layers and 1 x 1 convolutions are replayed and dotted in one
    go, and other replays are dotted without writing the products.
    """
    if use.call is not None:
        images = {n: s.image(tangents[id(s.parameter)]) for n, s in use.sources.items()}
        matrices = _as_matrices(use.call, images, axis, b, size)
        if matrices is not None:
            present = [t for t in matrices if t is not None]
            run = kernel_for("hypergradient_dot", present)
            if run is not None:
                return run(*matrices)
    tangent = use.output_tangent(tangents)
    if axis == SampleAxis() and len(b) == size and tangent.shape == b.shape:
        run = kernel_for("sample_dot", [tangent, b])
        if run is not None:
            return run(tangent, b)
    # the replayed output is a temporary and may be overwritten. Without a call the tangent is a
    # view of v, which may not
    return axis.dot(tangent, b, size, overwrite=use.call is not None)


def _as_matrices(
    call: LayerCall, images: Mapping[str, Tensor], axis: SampleAxis, b: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """(a [B, T, K], v [N, K], b [B, T, N], direction of the bias) of a call that is a product."""
    function = call.rule.function
    if "weight" not in images:
        return None
    v, bias, a = images["weight"], images.get("bias"), call.input.detach()
    if function is F.linear and axis.axis < b.ndim - 1 and v.ndim == 2:
        rows = [axis.samples(t, size).reshape(size, -1, t.shape[-1]) for t in (a, b)]
        return rows[0], v, rows[1], bias
    if not function.__name__.startswith("conv") or axis != SampleAxis() or len(b) != size:
        return None
    options = convolution_options(call)
    if options is None or len(a) != size or any(k != 1 for k in v.shape[2:]):
        return None
    plain = {"stride": 1, "padding": 0, "output_padding": 0}
    if options["transposed"] or options["groups"] != 1:
        return None
    if any(set(options[name]) != {value} for name, value in plain.items()):
        return None
    return a.flatten(2).transpose(1, 2), v.flatten(1), b.flatten(2).transpose(1, 2), bias
