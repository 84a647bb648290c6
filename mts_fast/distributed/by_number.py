"""Columns of samples that are spread over ranks in any way, joined by the samples' numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mts_fast._check import (
    check_floating,
    check_integer,
    check_length,
    check_mapping,
    check_positive_int,
    check_range,
    fail,
)
from mts_fast._hosts import hosts_of
from mts_fast.distributed.group import Group
from mts_fast.distributed.ranks import Alone, Header, Ranks
from mts_fast.distributed.wrappers import group_of

OP = "joined_columns"


def joined_columns(
    columns: Mapping[str, Tensor],
    indices: Tensor,
    num_samples: int,
    *,
    process_group: Any = "auto",
) -> dict[str, Tensor]:
    """Columns of all ranks' samples in the order of the data set, the same on every rank.

    Each rank passes columns of the samples that it has had, such as `features.training_dynamics` of
    its part, or losses that it has recorded. Every rank calls it.

    Args:
        columns: by name, each [n] or [n, width], floating point; the same names, widths and dtypes
            on every rank, of no rows where a rank has no samples.
        indices: [n], integers, which samples of the data set these are, in any order. A sample may
            be repeated, on one rank and on several: the first row of the lowest rank counts, which
            leaves out what a sampler repeats to make parts equal.
        num_samples: N of the data set.
        process_group: "auto", all ranks where torch.distributed is initialised; a group; or None,
            this process alone.

    Returns:
        the columns, each [N] or [N, width], on the device of the indices.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, indices out of range, samples that
            no rank has (with their numbers), ranks that differ in names or `num_samples`.
        RuntimeError: another rank has failed, by its number.

    Notes:
        Every rank gets all rows: N x width numbers of each column.

    Example:
        >>> import torch
        >>> from mts_fast.distributed import joined_columns
        >>> part = torch.tensor([2, 0, 1, 0])  # one process here
        >>> joined_columns({"loss": torch.tensor([0.2, 0.0, 0.1, 9.0])}, part, 3)["loss"]
        tensor([0.0000, 0.1000, 0.2000])
    """

    def check() -> dict[str, Tensor]:
        check_positive_int(OP, "num_samples", num_samples)
        check_integer(OP, "indices", indices, ndim=1)
        hint = "they count the samples of the data set"
        check_range(OP, "indices", indices, 0, num_samples, hint)
        check_mapping(OP, "columns", columns, "pass a dict of names to tensors")
        if not columns:
            fail(ValueError, OP, "columns", "of one column or more", "none", "pass some")
        for name, column in columns.items():
            check_floating(OP, f"column {name!r}", column)
            if column.ndim not in (1, 2):
                shape, hint = tuple(column.shape), "flatten it, one row a sample"
                fail(ValueError, OP, f"column {name!r}", "[n] or [n, width]", shape, hint)
            check_length(OP, f"column {name!r}", column, len(indices))
        return dict(columns)

    def header(checked: dict[str, Tensor]) -> Header:
        same = {"num_samples": num_samples, "the names of columns": list(checked)}
        return Header((len(indices),), same)

    ranks = ranks_of_hosts(OP, process_group)
    checked, opened = ranks.open(check, header)
    sent = [t.detach().cpu() for t in (indices.long(), *checked.values())]
    shard = opened.shards[0]
    numbers, *joined = ranks.rows("columns", shard, lambda: sent) if shard.total else sent
    first = first_of_each(numbers)
    present = torch.zeros(num_samples, dtype=torch.bool)
    present[numbers] = True
    if not present.all():
        missing = (~present).nonzero().flatten().tolist()
        expected = f"of all {num_samples} samples, on some rank each"
        got = f"none for {len(missing)} of them ({', '.join(map(str, missing[:5]))})"
        fail(ValueError, OP, "indices", expected, got, "pass the rest, too")
    return {
        name: column[first].to(indices.device) for name, column in zip(checked, joined, strict=True)
    }


def first_of_each(numbers: Tensor) -> Tensor:
    """Places of the first occurrence of each distinct number in numbers [n], by that number."""
    order = numbers.argsort(stable=True)
    in_order = numbers[order]
    first = torch.ones_like(in_order, dtype=torch.bool)
    first[1:] = in_order[1:] != in_order[:-1]
    return order[first]


def ranks_of_hosts(op: str, group: Any) -> Ranks:
    """The ranks of a group, which exchange tensors of the CPU."""
    group = group_of(op, group)
    return (
        Alone() if group is None else Group(op, hosts_of(group), torch.device("cpu"), in_band=True)
    )
