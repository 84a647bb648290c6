"""Online features: where a sample lies among the validation batch, at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast.reference.unit_rows import power_of_two, unit_rows

# added to the variance before the root when features are standardised.
VARIANCE_EPSILON = 1e-8


def online_features(features: Tensor, val_features: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """(nearest [B, k], centroid [B, 1]): top-k cosines to the validation features, and the cosine
    to their mean. features [B, D] and val_features [V, D] are penultimate activations.
    """
    scaled = val_features / power_of_two(torch.linalg.vector_norm(val_features.detach(), torch.inf))
    rows = torch.cat([features, val_features, scaled.mean(0, keepdim=True)])
    unit, val_unit, centroid = unit_rows(rows).split([len(features), len(val_features), 1])
    nearest = (unit @ val_unit.T).topk(k, dim=1).values
    return nearest, (unit @ centroid[0])[:, None]


def standardize(values: Tensor) -> Tensor:
    """Subtract one mean and divide by one population deviation, both over all entries."""
    # the mean of var_mean is a running one, and rounded more
    variance = values.var(correction=0)
    return (values - values.mean()) / (variance + VARIANCE_EPSILON).sqrt()
