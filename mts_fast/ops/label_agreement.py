"""label_agreement: contract, validation and dispatch."""

from __future__ import annotations

from torch import Tensor

from mts_fast import reference
from mts_fast._check import (
    check_device,
    check_floating,
    check_integer,
    check_length,
    check_number,
    check_range,
    fail,
)
from mts_fast.backends.cpp import label_agreement as cpp
from mts_fast.backends.cpp.eligibility import reasons_against_cpp
from mts_fast.backends.registry import register, resolve
from mts_fast.reference.label_agreement import EPSILON

OP = "label_agreement"

register(OP, "reference", reference.label_agreement)
register(OP, "cpp", cpp.label_agreement, reasons_against_cpp, devices=("cpu", "cuda"))


def label_agreement(
    similarity: Tensor, neighbors: Tensor, labels: Tensor, *, epsilon: float = EPSILON
) -> tuple[Tensor, Tensor]:
    """Share of each sample's nearest neighbours that carry its label.

    plain_i = sum_k [y_nk = y_i] / K; weighted_i = sum_k s_ik [y_nk = y_i] / (sum_k s_ik + epsilon).

    Args:
        similarity: s [N, K], floating point; similarity of sample i to its k-th neighbour.
        neighbors: n [N, K], integers in [0, N); indices into labels.
        labels: y [N], integers.
        epsilon: added to the sum of similarities.

    Returns:
        (plain [N], weighted [N]) of similarity's dtype.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, K = 0, or a neighbour outside the pool.
        RuntimeError: an explicit backend that cannot run.

    Source: docs/algorithm.md, features: 5-NN label agreement.

    Example:
        >>> import torch
        >>> from mts_fast.ops.label_agreement import label_agreement
        >>> s, n = torch.ones(2, 1), torch.tensor([[1], [0]])
        >>> label_agreement(s, n, torch.tensor([4, 4]))[0].tolist()
        [1.0, 1.0]
    """
    check_floating(OP, "similarity", similarity, ndim=2)
    if similarity.shape[1] == 0:
        hint = "ask for one neighbour at least"
        fail(ValueError, OP, "similarity", "[N, K] with K >= 1", tuple(similarity.shape), hint)
    check_integer(OP, "neighbors", neighbors, ndim=2)
    if neighbors.shape != similarity.shape:
        expected = f"of similarity's shape {tuple(similarity.shape)}"
        hint = "pass what neighbor_statistics gave"
        fail(ValueError, OP, "neighbors", expected, tuple(neighbors.shape), hint)
    check_integer(OP, "labels", labels, ndim=1)
    check_length(OP, "labels", labels, len(similarity))
    for name, value in (("neighbors", neighbors), ("labels", labels)):
        check_device(OP, name, value, similarity.device, "similarity")
    check_number(OP, "epsilon", epsilon, at_least=0)
    if not neighbors.is_cuda:
        hint = "they are indices into labels"
        check_range(OP, "neighbors", neighbors, 0, len(labels), hint)
    function = resolve(OP, [similarity, neighbors, labels])
    return function(similarity, neighbors.long(), labels.long(), epsilon)
