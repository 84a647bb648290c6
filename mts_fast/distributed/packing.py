"""Rows of several tensors as bytes side by side, to send them in one message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The dtype of each tensor and the shape of one of its rows."""

    columns: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """That of tensors [rows, ...]."""
        return cls(tuple((t.dtype, tuple(t.shape[1:])) for t in tensors))

    @property
    def bytes(self) -> list[int]:
        """Of one row of each tensor."""
        return [dtype.itemsize * math.prod(shape) for dtype, shape in self.columns]

    def packed(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """[rows, bytes] uint8; no rows for no tensors."""
        if not tensors:
            return torch.empty(0, max(1, sum(self.bytes)), dtype=torch.uint8, device=device)
        rows = len(tensors[0])
        parts = [
            t.to(device).contiguous().view(rows, size // t.itemsize).view(torch.uint8)
            for t, size in zip(tensors, self.bytes, strict=True)
            if size
        ]
        return torch.cat(parts, 1)

    def unpacked(self, rows: Tensor) -> list[Tensor]:
        """The tensors again."""
        pieces = rows[:, : sum(self.bytes)].split(self.bytes, 1)
        return [
            piece.clone(memory_format=torch.contiguous_format).view(dtype).view(len(rows), *shape)
            if size
            else torch.empty(len(rows), *shape, dtype=dtype, device=rows.device)
            for piece, size, (dtype, shape) in zip(pieces, self.bytes, self.columns, strict=True)
        ]

    def __str__(self) -> str:
        return ", ".join(f"{str(d).removeprefix('torch.')} {list(s)}" for d, s in self.columns)
