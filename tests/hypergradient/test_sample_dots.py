"""<x, y> of each sample where no kernel serves: 16-bit products against float64, and bytes."""

import math

import pytest
import torch
from comparison import assert_bitwise
from roofline import step_cost

from mts_fast.hypergradient.ghost.sample_axis import SampleAxis, SampleRows

SAMPLES, ENTRIES = 6, 2000
SMALLEST, LARGEST = 1e-7, 6e4  # of float16, nearly
AXES = {
    "side by side": SampleAxis(),
    "interleaved": SampleAxis(interleaved=True),
    "rows": SampleRows(torch.arange(SAMPLES).flip(0)),
}


def spread(low=SMALLEST, high=LARGEST):
    """Values [B, n] of both signs whose logarithms are uniform."""
    logs = torch.empty(SAMPLES, ENTRIES).uniform_(math.log(low), math.log(high))
    return (logs.exp() * (torch.randint(2, logs.shape) * 2 - 1)).half()


def opposed(product):
    """Pairs whose products are alike, though their factors are not."""
    x = spread()
    return x, (product / x.float()).clamp(-LARGEST, LARGEST).half()


PAIRS = {
    "spread": lambda: (spread(), spread()),
    "products below the smallest float16": lambda: (spread(1e-7, 1e-4), spread(1e-7, 1e-4)),
    "products above the largest float16": lambda: (spread(1e3, 6e4), spread(1e3, 6e4)),
    "alike products of unlike factors": lambda: opposed(1e-4),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_float16_of_any_size_is_summed_as_exactly_as_float32(axis, pair, overwrite):
    x, y = PAIRS[pair]()
    terms = x.double() * y.double()
    dots = AXES[axis].dot(x.clone(), y, SAMPLES, overwrite=overwrite)
    truth, size = terms.sum(1), terms.abs().sum(1)
    if axis == "rows":
        truth, size = truth.flip(0), size.flip(0)
    assert dots.dtype == torch.float32
    assert ((dots - truth).abs() / size).max() < 2**-22  # observed 2^-23


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32")])
def test_a_copied_factor_does_not_touch_its_source(dtypes):
    x, y = (torch.randn(SAMPLES, ENTRIES).to(getattr(torch, name)) for name in dtypes)
    before = x.clone(), y.clone()
    for axis in AXES.values():
        dots = axis.dot(x, y, SAMPLES, overwrite=False)
        assert dots.dtype == torch.float32
        assert_bitwise(x, before[0])
        assert_bitwise(y, before[1])
        # one vector for all samples broadcasts
        one = axis.dot(x[:1], y, SAMPLES, overwrite=False)
        assert_bitwise(one, axis.dot(x[:1].expand_as(x), y, SAMPLES, overwrite=False))


@pytest.mark.parametrize(
    ("dtype", "moved"),
    [
        (torch.float16, (2 + 4) + (4 + 2 + 4) + 4),  # one copy, the product in it, its sum
        (torch.bfloat16, (2 + 2 + 2) + 2),
        (torch.float32, (4 + 4 + 4) + 4),
    ],
)
def test_bytes_of_an_entry(dtype, moved):
    x, y = (torch.randn(SAMPLES, ENTRIES).to(dtype) for _ in range(2))
    cost = step_cost(lambda: SampleAxis().dot(x, y, SAMPLES, overwrite=False))
    assert cost.bytes == SAMPLES * (moved * ENTRIES + 4)
