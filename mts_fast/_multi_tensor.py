"""Lists of tensors in few launches, by torch's multi-tensor (foreach) operators.

Those take plain dense tensors of one device and one dtype at once; subclasses (sharded, quantized)
and sparse ones are treated one by one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._columns import (
    are_contiguous,
    are_of_one_kind,
    are_plain,
    data_of,
    is_plain,
    joined,
    parts_of,
    shapes_of,
    sizes_of,
    strides_of,
)

# entries that are put side by side at most, by device type: they stay in a CPU's cache; of others
# 16 MB of float32, far more than a launch is worth
CHUNK = {"cpu": 2**18}
OTHER_DEVICES = 2**22


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A detached copy of each."""
    if are_plain(tensors):
        out = list(map(torch.empty_like, data_of(tensors)))
        _copy(out, tensors)
        return out
    plain = [i for i, t in enumerate(tensors) if is_plain(t)]
    made = iter(copies([tensors[i] for i in plain]))
    among = set(plain)
    return [next(made) if i in among else t.detach().clone() for i, t in enumerate(tensors)]


def overwrite(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, through `.data`: version counters do not move."""
    if are_plain(targets) and are_plain(values):
        _copy(targets, values)
        return
    plain = []
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        if is_plain(target) and is_plain(value):
            plain.append(i)
        else:
            target.data.copy_(value)
    _copy([targets[i] for i in plain], [values[i] for i in plain])


class SavedValues:
    """Copies of tensors' values, to put them back.

    Those of small tensors lie side by side: they are taken apart when they are asked for, which a
    step that succeeds never does.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        # (indices, their values side by side)
        self._joined: list[tuple[list[int], Tensor]] = []
        alone: list[int] = []
        if are_plain(self.tensors) and are_contiguous(self.tensors):
            for group in by_kind(self.tensors):
                for part in parts([self.tensors[i] for i in group]):
                    members = [group[k] for k in part]
                    if len(members) == 1:
                        alone += members
                        continue
                    values = joined(data_of([self.tensors[i] for i in members]))
                    self._joined.append((members, values))
        else:
            alone = list(range(len(self.tensors)))
        copied = copies([self.tensors[i] for i in alone])
        self._alone = dict(zip(alone, copied, strict=True))
        self._like = shapes_of(self.tensors), strides_of(self.tensors)

    def values(self) -> list[Tensor]:
        """The values, in the order of the tensors."""
        made = dict(self._alone)
        for members, values in self._joined:
            shapes, strides = ([column[i] for i in members] for column in self._like)
            made.update(zip(members, parts_of(values, shapes, strides), strict=True))
        return [made[i] for i in range(len(self.tensors))]

    def restore(self) -> None:
        """Copy the values back, through `.data`."""
        overwrite(self.tensors, self.values())


def inner_product(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """sum_k <a_k, b_k> [] in `dtype`, on the device of the first; products in those of the tensors,
    in float32 at least.

    Tensors are put side by side, in `parts`.
    """
    sums = []
    for group in by_kind(a):
        for part in parts([a[i] for i in group]):
            rows = [group[i] for i in part]
            flat_a, flat_b = (side_by_side([t[i] for i in rows]) for t in (a, b))
            if flat_a.itemsize < 4:  # products of small 16-bit numbers would be 0
                flat_a = flat_a.float()
            sums.append((flat_a * flat_b).sum().to(a[0].device, dtype))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all entries [], in float32 at least, on the device of the first."""
    norms: list[Tensor] = []
    for group in by_kind(tensors):
        part = [tensors[i] for i in group]
        dtype = torch.promote_types(part[0].dtype, torch.float32)
        norms += torch._foreach_norm(part, 2.0, dtype=dtype)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def largest_entry(tensors: Sequence[Tensor]) -> Tensor:
    """max |x| over all entries [], on the device of the first; NaN where one is, 0 of none."""
    most: list[Tensor] = []
    for group in by_kind(tensors):
        members = [t for i in group if (t := tensors[i]).numel()]
        if members and members[0].device.type in CHUNK:
            # on a CPU a multi-tensor operator is a loop
            for part in parts(members):
                most.append(side_by_side([members[i] for i in part]).abs().amax())
        elif members:
            most += torch._foreach_norm(members, math.inf)
    if not most:
        return torch.zeros(())
    if len({m.dtype for m in most}) > 1:
        most = [m.double() for m in most]
    return torch.stack([m.to(most[0].device) for m in most]).amax()


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


def by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the tensors that one multi-tensor operator takes: of one device and dtype."""
    if are_of_one_kind(tensors):
        return [list(range(len(tensors)))] if tensors else []
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        groups[t.device, t.dtype].append(i)
    return list(groups.values())


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one device and dtype as one vector, in the order of their entries."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    if are_plain(tensors):
        return joined(tensors)
    return torch.cat([t.reshape(-1) for t in tensors])


def parts(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Consecutive indices of tensors with at most CHUNK entries together, or of single ones."""
    most = CHUNK.get(tensors[0].device.type, OTHER_DEVICES) if tensors else 0
    sizes = sizes_of(tensors)
    if sizes and sum(sizes) <= most:
        return [list(range(len(sizes)))]
    made: list[list[int]] = []
    filled = 0
    for i, size in enumerate(sizes):
        if not made or filled + size > most:
            made.append([])
            filled = 0
        made[-1].append(i)
        filled += size
    return made


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    to, of = data_of(targets), data_of(values)
    for group in by_kind(targets):
        if len(group) == len(to):
            torch._foreach_copy_(to, of)
        else:
            torch._foreach_copy_([to[i] for i in group], [of[i] for i in group])
