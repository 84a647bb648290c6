"""percentile_rank: contract, validation and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_device,
    check_finite,
    check_floating,
    check_integer,
    check_length,
    check_range,
)
from mts_fast.backends.cpp import percentile_rank as cpp
from mts_fast.backends.cpp.eligibility import reasons_against_cpp
from mts_fast.backends.registry import register, resolve

OP = "percentile_rank"

register(OP, "reference", reference.percentile_rank)
register(OP, "cpp", cpp.percentile_rank, reasons_against_cpp)


def percentile_rank(values: Tensor, labels: Tensor) -> Tensor:
    """Rank of each value among those of its class, from 0 (least) to 1.

    rank_i / (n - 1), n the size of the class; 0 in a class of one.

    Args:
        values: [N], floating point, without NaN or infinity.
        labels: [N], integers >= 0.

    Returns:
        [N] of values' dtype.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or lengths, NaN or infinity (with the rows).
        RuntimeError: an explicit backend that cannot run.

    Notes:
        Ties are ranked in order of index.

    Source: docs/algorithm.md, features: percentile rank of the distance to the class's median.

    Example:
        >>> import torch
        >>> from mts_fast.ops import percentile_rank
        >>> percentile_rank(torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1])).tolist()
        [1.0, 0.0, 0.5, 0.0]
    """
    check_floating(OP, "values", values, ndim=1)
    check_integer(OP, "labels", labels, ndim=1)
    check_length(OP, "labels", labels, len(values))
    check_device(OP, "labels", labels, values.device, "values")
    if len(values) == 0:
        return torch.empty_like(values)
    check_finite(OP, "values", values, "drop or repair these rows")
    labels = labels.long()
    check_range(OP, "labels", labels, 0, 1 + int(labels.max()), "number the classes from 0")
    return resolve(OP, [values, labels])(values.detach(), labels)
