"""sample_dot in C++: accuracy, layouts, and what it does not serve."""

import pytest
import torch
from comparison import assert_bitwise

from mts_fast import reference, use_backend
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import sample_dot

pytestmark = pytest.mark.skipif(not extension().available, reason=extension().reason)


# one entry, part of the lanes, one run of 4096 and a bit, several spans of 32768
@pytest.mark.parametrize("length", [1, 63, 4100, 70_001])
@pytest.mark.parametrize("size", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy(dtype, size, length):
    g = torch.Generator().manual_seed(length)
    x, y = (torch.randn(size, length, generator=g, dtype=torch.float64).to(dtype) for _ in "xy")
    truth = (x.double() * y.double()).sum(1)
    scale = (x.double() * y.double()).abs().sum(1)
    with use_backend("cpp"):
        dots = sample_dot(x, y)
        assert_bitwise(dots, sample_dot(x, y))
    # in units of the sum of sizes: float32 sums of 64 products; observed 1.2 eps
    assert dots.dtype == dtype and dots.shape == (size,)
    assert ((dots.double() - truth).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t[1:],  # offset
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # samples inside
        lambda t: torch.stack([t, t], -1)[..., 0],  # gaps
        lambda t: t[:0],  # no sample
        lambda t: t[..., :0],  # no entry
    ],
)
def test_layouts(view):
    x, y = (view(torch.randn(4, 3, 5, 6)) for _ in "xy")
    truth = (x.double() * y.double()).flatten(1).sum(1)
    with use_backend("cpp"):
        torch.testing.assert_close(sample_dot(x, y).double(), truth, rtol=1e-5, atol=1e-5)
        other = y.contiguous()
        torch.testing.assert_close(sample_dot(x, other).double(), truth, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_show():
    x, y = torch.ones(3, 100), torch.ones(3, 100)
    x[0, 70], x[1, 99] = torch.nan, torch.inf
    with use_backend("cpp"):
        nan, infinite, right = sample_dot(x, y).tolist()
    assert nan != nan and infinite == float("inf") and right == 100.0


def test_what_it_does_not_serve():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="float32 or float64"):
        sample_dot(x.bfloat16(), y.bfloat16())
    with use_backend("cpp"), pytest.raises(RuntimeError, match="takes one dtype"):
        sample_dot(x, y.double())
    mixed = sample_dot(x, y.double())  # "auto" takes the reference
    assert_bitwise(mixed, reference.sample_dot(x, y.double()))


def test_the_op_is_registered_rightly():
    sample_dot(torch.ones(1, 1), torch.ones(1, 1))  # loads the library
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    torch.library.opcheck(torch.ops.mts_fast.sample_dot, (x, y))
