"""The contracts: schemas, validation, dispatch. No element maths."""

from mts_fast.backends.registry import current_backend, has_kernels, kernel_for, use_backend
from mts_fast.ops.class_centroids import ClassCentroids, class_centroids_
from mts_fast.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from mts_fast.ops.hypergradient_dot import hypergradient_dot, sample_dot
from mts_fast.ops.label_agreement import label_agreement
from mts_fast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_tangent,
)
from mts_fast.ops.neighbor_statistics import (
    NeighborChunk,
    NeighborLists,
    NeighborStatistics,
    neighbor_statistics,
    neighbor_statistics_,
)
from mts_fast.ops.norm_sample_gradients import (
    group_norm_sample_gradients,
    layer_norm_sample_gradients,
)
from mts_fast.ops.percentile_rank import percentile_rank
from mts_fast.ops.update_rules import register_update_rule
from mts_fast.ops.virtual_update import VirtualUpdate, trainable_parameters, virtual_update
from mts_fast.ops.weights import normalize_weights, selector_gradient
from mts_fast.reference import SampleStatistics

__all__ = [
    "ClassCentroids",
    "NeighborChunk",
    "NeighborLists",
    "NeighborStatistics",
    "SampleStatistics",
    "VirtualUpdate",
    "class_centroids_",
    "cross_entropy",
    "current_backend",
    "group_norm_sample_gradients",
    "has_kernels",
    "hypergradient_dot",
    "kernel_for",
    "label_agreement",
    "layer_norm_sample_gradients",
    "linear_cross_entropy",
    "linear_cross_entropy_tangent",
    "neighbor_statistics",
    "neighbor_statistics_",
    "normalize_weights",
    "percentile_rank",
    "register_update_rule",
    "sample_dot",
    "selector_gradient",
    "trainable_parameters",
    "use_backend",
    "virtual_update",
    "weighted_cross_entropy",
]
