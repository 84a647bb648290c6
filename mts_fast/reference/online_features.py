"""Online features: where a sample lies among the validation batch, at every step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# added to the variance before the root when features are standardised.
VARIANCE_EPSILON = 1e-8


def online_features(features: Tensor, val_features: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """(nearest [B, k], centroid [B, 1]): top-k cosines to the validation features, and the cosine
    to their mean. features [B, D] and val_features [V, D] are penultimate activations.
    """
    unit = F.normalize(features, dim=1)
    nearest = (unit @ F.normalize(val_features, dim=1).T).topk(k, dim=1).values
    centroid = unit @ F.normalize(val_features.mean(0), dim=0)
    return nearest, centroid[:, None]


def standardize(values: Tensor) -> Tensor:
    """Subtract one mean and divide by one population deviation, both over all entries."""
    variance = values.var(correction=0)
    return (values - values.mean()) / (variance + VARIANCE_EPSILON).sqrt()
