"""Lists of tensors in few launches, by torch's multi-tensor (foreach) operators.

Those take plain dense tensors of one device and one dtype at once; subclasses (sharded, quantized)
and sparse ones are treated one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# entries that are put side by side at most, by device type: they stay in a CPU's cache; of others
# 16 MB of float32, far more than a launch is worth
CHUNK = {"cpu": 2**18}
OTHER_DEVICES = 2**22
PLAIN_TYPES = {Tensor, nn.Parameter}
# without complex ones, which may be conjugated by a mark alone, and quantized ones
PLAIN_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A detached copy of each."""
    out: list[Tensor] = []
    plain = []
    for i, t in enumerate(tensors):
        if is_plain(t):
            plain.append(i)
            out.append(torch.empty_like(t.data))
        else:
            out.append(t.detach().clone())
    _copy([out[i] for i in plain], [tensors[i] for i in plain])
    return out


def overwrite(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, through `.data`: version counters do not move."""
    plain = []
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        if is_plain(target) and is_plain(value):
            plain.append(i)
        else:
            target.data.copy_(value)
    _copy([targets[i] for i in plain], [values[i] for i in plain])


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """sum_k <a_k, b_k> [] in `dtype`, on the device of the first; products in those of the tensors,
    in float32 at least.

    Tensors are put side by side, in `parts`.
    """
    sums = []
    for group in by_kind(a):
        for part in parts([a[i] for i in group]):
            rows = [group[i] for i in part]
            flat_a, flat_b = (
                t[rows[0]].reshape(-1) if len(rows) == 1 else _flat([t[i] for i in rows])
                for t in (a, b)
            )
            if flat_a.itemsize < 4:  # products of small 16-bit numbers would be 0
                flat_a = flat_a.float()
            sums.append((flat_a * flat_b).sum().to(a[0].device, dtype))
    return torch.stack(sums).sum()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all entries [], in float32 at least, on the device of the first."""
    norms: list[Tensor] = []
    for group in by_kind(tensors):
        part = [tensors[i] for i in group]
        dtype = torch.promote_types(part[0].dtype, torch.float32)
        norms += torch._foreach_norm(part, 2.0, dtype=dtype)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def multiples(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """factor * tensor for each, in its dtype; factor is []."""
    out = list(tensors)
    for group in by_kind(tensors):
        part = [tensors[i] for i in group]
        made = torch._foreach_mul(part, factor.to(part[0].device))
        for i, tensor in zip(group, made, strict=True):
            out[i] = tensor
    return out


def sums(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """a_k + b_k for each; the pairs are of one device and dtype."""
    out = list(a)
    for group in by_kind(a):
        made = torch._foreach_add([a[i] for i in group], [b[i] for i in group])
        for i, tensor in zip(group, made, strict=True):
            out[i] = tensor
    return out


def by_kind(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Indices of the tensors that one multi-tensor operator takes: of one device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        groups[t.device, t.dtype].append(i)
    return list(groups.values())


def is_plain(t: Tensor) -> bool:
    """Whether the multi-tensor operators take it."""
    return (
        type(t) in PLAIN_TYPES
        and t.dtype in PLAIN_DTYPES
        and t.layout is torch.strided
        and not t.is_neg()
    )


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for group in by_kind(targets):
        torch._foreach_copy_([targets[i].data for i in group], [values[i].data for i in group])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def parts(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Consecutive indices of tensors with at most CHUNK entries together, or of single ones."""
    most = CHUNK.get(tensors[0].device.type, OTHER_DEVICES) if tensors else 0
    made: list[list[int]] = []
    filled = 0
    for i, tensor in enumerate(tensors):
        size = tensor.numel()
        if not made or filled + size > most:
            made.append([])
            filled = 0
        made[-1].append(i)
        filled += size
    return made
