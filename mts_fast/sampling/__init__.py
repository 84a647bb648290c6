"""Sampled steps: which candidates to compute, and what the computed ones say of all."""

from mts_fast.sampling.estimators import (
    Draw,
    Regression,
    difference_estimator,
    regression_estimator,
    variance_ratio,
)
from mts_fast.sampling.inclusion import (
    check_number_of_samples,
    inclusion_probabilities,
    size_measure,
    systematic_sample,
)

__all__ = [
    "Draw",
    "Regression",
    "check_number_of_samples",
    "difference_estimator",
    "inclusion_probabilities",
    "regression_estimator",
    "size_measure",
    "systematic_sample",
    "variance_ratio",
]
