"""How many of a sample's nearest neighbours carry its label."""

from __future__ import annotations

from torch import Tensor

# keeps the weighted share finite where all similarities are 0.
EPSILON = 1e-8


def label_agreement(
    similarity: Tensor,
    neighbors: Tensor,
    labels: Tensor,
    epsilon: float = EPSILON,
    pool_labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(plain [N], weighted [N]): share of the K neighbours with the same label, plain and weighted
    by similarity: sum of the matching similarities / (sum of all + epsilon).

    similarity [N, K], neighbors [N, K] (indices into labels, or into the pool's [M] where these are
    a part of it), labels [N].
    """
    pool = labels if pool_labels is None else pool_labels
    same = pool[neighbors] == labels[:, None]  # [N, K]
    plain = same.to(similarity.dtype).mean(1)
    return plain, (similarity * same).sum(1) / (similarity.sum(1) + epsilon)
