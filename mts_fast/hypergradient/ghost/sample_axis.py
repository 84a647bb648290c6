"""Where the samples lie in a layer's output, told apart by a factor on each sample's cotangent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# b of a scaled sample may differ from the scaled b by this many roundings, and by no more than
# LARGEST_GAP in all. Where samples are independent the factors, powers of two, commute with
# rounding, so that the gap is 0 but for kernels that add in a changing order.
ROUNDINGS = 1000
LARGEST_GAP = 0.05
# gaps below this many roundings of the largest sample's b are noise, whatever the sample's own b
NOISE = 16

# factors of the samples' cotangents: distinct, of both signs, and exact in any precision
FACTORS = (1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 8.0, -8.0)

# entries of the sketch of one sample's b: signed sums of the entries of b. Its norm is that of b to
# about 1 / sqrt(2 x 16) = 18 %.
SKETCH_SIZE = 16


def rounding_share(dtype: torch.dtype) -> float:
    """Relative gap that rounding may explain."""
    return min(LARGEST_GAP, ROUNDINGS * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class SampleAxis:
    """The samples lie on one axis of n = B r entries.

    Sample i owns r entries side by side (i r and on), or, where `interleaved`, every B-th entry
    (i, i + B, ...), as in torch's attention.
    """

    axis: int = 0
    interleaved: bool = False

    def fits(self, shape: torch.Size, batch_size: int) -> bool:
        """Whether a tensor of that shape can have its samples there."""
        return self.axis < len(shape) and shape[self.axis] % batch_size == 0

    def simplest(self, shape: torch.Size, batch_size: int) -> SampleAxis:
        """The first of all layouts that give the same entries to each sample in that shape."""
        if batch_size == 1:
            return SampleAxis()
        return SampleAxis(self.axis) if shape[self.axis] == batch_size else self

    def samples(self, values: Tensor, batch_size: int) -> Tensor:
        """[B, r, ...]: the samples first; a view."""
        moved = values.movedim(self.axis, 0)
        if self.interleaved:
            return moved.unflatten(0, (-1, batch_size)).transpose(0, 1)
        return moved.unflatten(0, (batch_size, -1))

    def alone(self, values: Tensor, sample: int, batch_size: int) -> Tensor:
        """The values with 0 at the entries of all other samples; a copy."""
        alone = torch.zeros_like(values)
        self.samples(alone, batch_size)[sample] = self.samples(values, batch_size)[sample]
        return alone

    def dot(self, x: Tensor, y: Tensor, batch_size: int, *, overwrite: bool) -> Tensor:
        """<x, y> per sample [B], accumulated in float32 or wider; x may broadcast to y.

        `overwrite` allows writing the product into x: a product in new memory took 8 times as long
        (all layers of a ViT in a step, 2 CPU cores), though it did not in a loop over one layer.
        """
        product = _product(x, y, overwrite)
        dtype = torch.promote_types(product.dtype, torch.float32)
        return self.samples(product, batch_size).flatten(1).sum(1, dtype=dtype)


class SampleRows(SampleAxis):
    """The rows of axis 0 are of these samples [n], in any order: tokens routed to an expert."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "rows", rows)

    rows: Tensor

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def fits(self, shape: torch.Size, batch_size: int) -> bool:
        """Whether a tensor of that shape can have these rows."""
        return len(shape) > 0 and shape[0] == len(self.rows)

    def simplest(self, shape: torch.Size, batch_size: int) -> SampleAxis:
        """Itself."""
        return self

    def samples(self, values: Tensor, batch_size: int) -> Tensor:
        """[B, r, ...] with r the most rows of one sample, filled up with 0; a copy."""
        order = torch.argsort(self.rows, stable=True)
        counts = torch.bincount(self.rows, minlength=batch_size)
        starts = counts.cumsum(0) - counts
        of_sample = self.rows[order]
        place = torch.arange(len(order), device=order.device) - starts[of_sample]
        most = int(counts.max()) if len(order) else 0
        filled = values.new_zeros(batch_size, most, *values.shape[1:])
        filled[of_sample, place] = values[order]
        return filled

    def alone(self, values: Tensor, sample: int, batch_size: int) -> Tensor:
        """The values with 0 in the rows of all other samples; a copy."""
        of_sample = (self.rows == sample).view(-1, *[1] * (values.ndim - 1))
        return torch.where(of_sample, values, torch.zeros_like(values))

    def dot(self, x: Tensor, y: Tensor, batch_size: int, *, overwrite: bool) -> Tensor:
        """<x, y> per sample [B], accumulated in float32 or wider."""
        product = _product(x, y, overwrite)
        dtype = torch.promote_types(product.dtype, torch.float32)
        rows = product.reshape(len(self.rows), -1).sum(1, dtype=dtype)
        return rows.new_zeros(batch_size).index_add_(0, self.rows, rows)

    def spread(self, per_sample: Tensor) -> Tensor:
        """[n] values of the rows' samples."""
        return per_sample[self.rows]


def _product(x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
    """x y, in x's memory where `overwrite` allows it or x was copied, and x does not broadcast.

    bfloat16 stays, in a third of the traffic: it has float32's range, and rounding the products
    adds no more than rounding x and y has. Products of float16 leave its range, and are float32:
    x is copied, y is read as it is.
    """
    if x.dtype is torch.float16 or x.dtype != y.dtype:
        passed = x
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32))
        overwrite = overwrite or x is not passed
    return x.mul_(y) if overwrite and x.shape == y.shape else x * y


class Spread:
    """Values per sample [B], as tensors that broadcast against layers' outputs; each length of
    axis and dtype is made once."""

    def __init__(self, per_sample: Tensor) -> None:
        self.per_sample = per_sample
        self._made: dict[tuple[int, bool, torch.dtype], Tensor] = {}

    def over(self, axis: SampleAxis, like: Tensor) -> Tensor:
        """The values at the entries of each sample in `like`, whose samples lie on `axis`."""
        if isinstance(axis, SampleRows):
            rows = axis.spread(self.per_sample).to(like.dtype)
            return rows.view(-1, *[1] * (like.ndim - 1))
        length = like.shape[axis.axis]
        times = length // len(self.per_sample)
        key = length, axis.interleaved and times > 1, like.dtype
        spread = self._made.get(key)
        if spread is None:
            spread = self.per_sample
            if times > 1:
                spread = (
                    spread.repeat(times) if axis.interleaved else spread.repeat_interleave(times)
                )
            spread = self._made[key] = spread.to(like.dtype)
        shape = [1] * like.ndim
        shape[axis.axis] = length
        return spread.view(shape)


def layouts(shape: torch.Size) -> tuple[SampleAxis, ...]:
    """Every place where a tensor with that many axes can have its samples, the likeliest first."""
    return tuple(SampleAxis(axis, last) for last in (False, True) for axis in range(len(shape)))


def distinct(candidates: Iterable[SampleAxis], shape: torch.Size, size: int) -> list[SampleAxis]:
    """The candidates that fit the shape, one for each way to divide the entries among B samples."""
    fitting = (c.simplest(shape, size) for c in candidates if c.fits(shape, size))
    return list(dict.fromkeys(fitting))


def factor_rounds(size: int, like: Tensor, seed: int) -> Iterator[Tensor]:
    """Factors [B], round after round until the rounds together tell any two samples apart.

    Each sample has a distinct number, whose digits in base 8 index FACTORS round by round.
    """
    numbers = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    values = torch.tensor(FACTORS, dtype=like.dtype)
    while True:
        yield values[numbers % len(FACTORS)].to(like.device)
        numbers = numbers // len(FACTORS)
        if not numbers.any():
            return


def sketch(b: Tensor, axis: SampleAxis, size: int, seed: int) -> Tensor:
    """Sums of each sample's entries under random signs, [B, SKETCH_SIZE]; linear in b."""
    rows = axis.samples(b, size).reshape(size, -1)
    rows = rows.to(torch.promote_types(b.dtype, torch.float32))
    generator = torch.Generator(b.device).manual_seed(seed)
    signs = torch.randint(2, rows.shape[1:], generator=generator, device=b.device)
    signed = rows * (2 * signs - 1)
    padded = F.pad(signed, (0, -signed.shape[1] % SKETCH_SIZE))
    return padded.view(size, -1, SKETCH_SIZE).sum(1)


def agrees(plain: Tensor, scaled: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether `scaled` [B, n] is `plain` times each sample's factor, up to rounding of `dtype`.

    A bool tensor without axes. Samples with NaN or infinity tell nothing and are left out.
    """
    back = scaled / factors[:, None].to(scaled.dtype)
    gap = (back - plain).norm(dim=1)
    norm = torch.maximum(back.norm(dim=1), plain.norm(dim=1))  # NaN where either is
    finite = torch.isfinite(norm)
    noise = NOISE * torch.finfo(plain.dtype).eps * torch.where(finite, norm, 0).max()
    return ((gap <= rounding_share(dtype) * norm + noise) | ~finite).all()
