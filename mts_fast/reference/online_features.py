"""Online features: where a sample lies among the validation batch, at every step."""

from __future__ import annotations

from torch import Tensor

from mts_fast.reference.unit_rows import power_of_two, unit_rows

# added to the variance before the root when features are standardised.
VARIANCE_EPSILON = 1e-8


def online_features(features: Tensor, val_features: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """(nearest [B, k], centroid [B, 1]): top-k cosines to the validation features, and the cosine
    to their mean. features [B, D] and val_features [V, D] are penultimate activations.
    """
    unit = unit_rows(features)
    nearest = (unit @ unit_rows(val_features).T).topk(k, dim=1).values
    scaled = val_features / power_of_two(val_features.detach().abs().amax())
    centroid = unit @ unit_rows(scaled.mean(0, keepdim=True))[0]
    return nearest, centroid[:, None]


def standardize(values: Tensor) -> Tensor:
    """Subtract one mean and divide by one population deviation, both over all entries."""
    variance = values.var(correction=0)
    return (values - values.mean()) / (variance + VARIANCE_EPSILON).sqrt()
