"""Plain PyTorch: what every op means, the oracle of every test, and the default."""

from mts_fast.reference.class_centroids import ClassCentroids, class_centroids_
from mts_fast.reference.cross_entropy import (
    SampleStatistics,
    cross_entropy,
    sample_statistics,
    weighted_cross_entropy,
)
from mts_fast.reference.distribution_features import distribution_features
from mts_fast.reference.hypergradient import (
    hypergradient_dots,
    hypergradient_double_backward,
)
from mts_fast.reference.hypergradient_dot import hypergradient_dot, sample_dot
from mts_fast.reference.label_agreement import label_agreement
from mts_fast.reference.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_tangent,
)
from mts_fast.reference.neighbor_statistics import (
    NeighborChunk,
    NeighborLists,
    NeighborStatistics,
    neighbor_statistics,
    neighbor_statistics_,
)
from mts_fast.reference.norm_sample_gradients import (
    group_norm_sample_gradients,
    layer_norm_sample_gradients,
)
from mts_fast.reference.online_features import online_features, standardize
from mts_fast.reference.percentile_rank import class_median, percentile_rank
from mts_fast.reference.perturb import global_norm, perturb
from mts_fast.reference.step import Batch, Trace, mts_step
from mts_fast.reference.target import Target
from mts_fast.reference.training_dynamics import forgetting, gradient_norm
from mts_fast.reference.unit_rows import unit_rows
from mts_fast.reference.virtual_update import (
    AdamState,
    SGDState,
    hypergradient_direction,
    kappa,
    virtual_update,
)
from mts_fast.reference.weights import log_weights, normalize_weights, selector_gradient

__all__ = [
    "AdamState",
    "Batch",
    "ClassCentroids",
    "NeighborChunk",
    "NeighborLists",
    "NeighborStatistics",
    "SGDState",
    "SampleStatistics",
    "Target",
    "Trace",
    "class_centroids_",
    "class_median",
    "cross_entropy",
    "distribution_features",
    "forgetting",
    "global_norm",
    "gradient_norm",
    "group_norm_sample_gradients",
    "hypergradient_direction",
    "hypergradient_dot",
    "hypergradient_dots",
    "hypergradient_double_backward",
    "kappa",
    "label_agreement",
    "layer_norm_sample_gradients",
    "linear_cross_entropy",
    "linear_cross_entropy_tangent",
    "log_weights",
    "mts_step",
    "neighbor_statistics",
    "neighbor_statistics_",
    "normalize_weights",
    "online_features",
    "percentile_rank",
    "perturb",
    "sample_dot",
    "sample_statistics",
    "selector_gradient",
    "standardize",
    "unit_rows",
    "virtual_update",
    "weighted_cross_entropy",
]
