"""torch's layers, one file each: replay, weight gradient, fused dot and norm parts side by side."""

from mts_fast.hypergradient.ghost.layers import (
    convolution,
    embedding,
    linear,
    linear_cross_entropy,
    matrix_product,
    normalization,
)

__all__ = [
    "convolution",
    "embedding",
    "linear",
    "linear_cross_entropy",
    "matrix_product",
    "normalization",
]
