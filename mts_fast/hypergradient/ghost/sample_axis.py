"""Where the samples lie in a layer's output: found once by a backward from single samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """The samples lie on one axis of n = B r entries.

    Sample i owns r entries side by side (i r and on), or, where `interleaved`, every B-th entry
    (i, i + B, ...), as in torch's attention.
    """

    axis: int = 0
    interleaved: bool = False

    def expand(self, per_sample: Tensor, like: Tensor) -> Tensor:
        """per_sample [B] as a tensor that broadcasts against `like`."""
        length = like.shape[self.axis]
        times = length // len(per_sample)
        spread = per_sample.repeat_interleave(times)
        if self.interleaved:
            spread = per_sample.repeat(times)
        shape = [1] * like.ndim
        shape[self.axis] = length
        return spread.to(like.dtype).view(shape)

    def rows(self, values: Tensor, batch_size: int) -> Tensor:
        """Entries of each sample side by side, [B, ...]; a view where strides allow it."""
        moved = values.movedim(self.axis, 0)
        if self.interleaved:
            return moved.unflatten(0, (-1, batch_size)).transpose(0, 1).reshape(batch_size, -1)
        return moved.reshape(batch_size, -1)


def find_axis(cotangents: Sequence[Tensor], samples: Sequence[int], size: int) -> SampleAxis | None:
    """The layout in which each cotangent is 0 outside its own sample; None where there is none.

    cotangents[k] is the output's gradient of sample samples[k]'s loss alone, size the batch.
    """
    for interleaved in (False, True):
        for axis, length in enumerate(cotangents[0].shape):
            layout = SampleAxis(axis, interleaved)
            if (
                length
                and length % size == 0
                and all(
                    _only_in(layout.rows(b, size), k)
                    for b, k in zip(cotangents, samples, strict=True)
                )
            ):
                return layout
    return None


def _only_in(rows: Tensor, k: int) -> bool:
    """Whether all rows but the k-th are zero."""
    active = rows.detach().ne(0).any(1)
    active[k] = False
    return not bool(active.any())
