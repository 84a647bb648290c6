"""A small FeatureTable's columns, and the equality of two tables."""

import torch
from comparison import assert_bitwise


def columns(n=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "loss": torch.rand(n, 1, generator=g, dtype=dtype) * 5,
        "cosines": torch.randn(n, 3, generator=g, dtype=dtype),
        "a_later_name": torch.randn(n, generator=g, dtype=dtype),
    }


def assert_same(result, expected):
    assert list(result) == list(expected)
    assert_bitwise(dict(result), dict(expected))
    assert_bitwise(result.standardized(), expected.standardized())
