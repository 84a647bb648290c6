"""Embeddings: rows of a table, one by one or in bags."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mts_fast.hypergradient.ghost.parts import GradientPart, ScatteredPart
from mts_fast.hypergradient.ghost.rules import LayerCall, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis


def _padding_row(call: LayerCall) -> int | None:
    """The row of an embedding's table that gets no gradient."""
    index = call.option("padding_idx", 2, None)
    return None if index is None else index % len(call.argument("weight"))


def _scaled_by_frequency(call: LayerCall) -> bool:
    """Whether autograd divides an embedding's gradient by how often its index is in the batch."""
    return bool(call.option("scale_grad_by_freq", 5, False))


def _as_autograd_has_it(call: LayerCall, y: Tensor) -> Tensor:
    """y with 0 at the padding index, divided by the frequency of an index if autograd does so."""
    padding, index = _padding_row(call), call.input
    if padding is not None:
        y = y.masked_fill((index == padding)[..., None], 0)
    if _scaled_by_frequency(call):
        times = torch.bincount(index.flatten(), minlength=len(call.argument("weight")))
        y = y / times[index][..., None].to(y.dtype)
    return y


def _bag_is_not_linear(call: LayerCall) -> str | None:
    if call.option("mode", 6, "mean") == "max":
        return "EmbeddingBag with mode='max' is not linear in its table"
    if call.option("scale_grad_by_freq", 5, False):
        return "EmbeddingBag with scale_grad_by_freq=True has a gradient of its own"
    return None


def _sample_parts(
    call: LayerCall, b: Tensor, axis: SampleAxis, size: int
) -> dict[str, GradientPart] | None:
    if axis != SampleAxis() or _scaled_by_frequency(call):
        return None
    index = call.input.reshape(size, -1)
    right = b.reshape(size, index.shape[1], -1)
    padding = _padding_row(call)
    if padding is not None:
        right = right * (index != padding)[..., None]
    return {"weight": ScatteredPart(index, right, len(call.argument("weight")))}


# `adjusted`: autograd gives the row of the padding index no gradient here, though a tied head may.
# `max_norm` is None in replays: the forward has already renormalised the table
register_layer(
    F.embedding,
    {"weight": 1},
    sample_parts=_sample_parts,
    adjusted=_as_autograd_has_it,
    replay_options={
        "max_norm": (3, None),
        "scale_grad_by_freq": (5, False),
        "sparse": (6, False),
    },
    adjusts=_scaled_by_frequency,
)
register_layer(
    F.embedding_bag,
    {"weight": 1},
    nullable=(),
    refuses=_bag_is_not_linear,
    replay_options={"max_norm": (3, None), "sparse": (7, False)},
)
