"""One call's part of row 6: the layer replayed with v, dotted with the output gradient b."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from mts_fast.backends.precision import like_convolutions
from mts_fast.hypergradient.ghost.function_call import FunctionCall
from mts_fast.hypergradient.ghost.layers.convolution import CONVOLUTIONS
from mts_fast.hypergradient.ghost.recorded import RecordedCall
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis
from mts_fast.ops import has_kernels, kernel_for

FLOAT32 = torch.float32


def call_dots(
    use: RecordedCall, axis: SampleAxis, b: Tensor, tangents: Mapping[int, Tensor], size: int
) -> Tensor:
    """<replay, b> per sample [B] for tangents of the roots, given by id.

    Where a kernel is in force, layers that are matrix products (linear ones, 1 x 1 convolutions)
    are replayed and dotted in one call, and other replays are dotted without writing the products.
    """
    call, images = use.call, use.images(tangents)
    as_product = None if call is None else call.rule.as_product
    if call is not None and as_product is not None and has_kernels("hypergradient_dot", b.device):
        product = as_product(call, images, b, axis, size)
        if product is not None:
            run = kernel_for("hypergradient_dot", [t for t in product if t is not None])
            if run is not None:
                with like_convolutions() if call.rule.function in CONVOLUTIONS else nullcontext():
                    return run(*product)
    tangent = use.tangent_of(images)
    if axis == SampleAxis() and len(b) == size and tangent.shape == b.shape:
        run = kernel_for("sample_dot", [tangent, b])
        if run is not None:
            return run(tangent, b)
    if axis == SampleAxis() and tangent.dtype == b.dtype == torch.promote_types(b.dtype, FLOAT32):
        whole = [1] * (b.ndim - tangent.ndim) + list(tangent.shape)
        if len(b) == size > 1 and whole[0] == 1 and tangent.numel() == b[0].numel():
            return b.reshape(size, -1) @ tangent.reshape(-1)  # one for all samples
    # the replayed output is a temporary and may be overwritten. Other tangents are views of v,
    # which must not be overwritten
    overwrite = call is not None and call.rule.reads_input and not isinstance(call, FunctionCall)
    return axis.dot(tangent, b, size, overwrite=overwrite)
