"""norm_sample_gradients: the reference and the C++ kernels against autograd, and every check."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, error_ratio, relative

from mts_fast import use_backend
from mts_fast.backends.cpp.extension import extension
from mts_fast.ops import (
    group_norm_sample_gradients,
    kernel_for,
    layer_norm_sample_gradients,
)
from mts_fast.ops.norm_sample_gradients import GROUP_NORM, LAYER_NORM

BACKENDS = ("reference", "cpp")
# B, T, C: the least; no multiple of the rows that the kernel takes at once, nor of its lanes;
# several blocks of rows; one position; a row longer than a block of lanes
ROWS = ((1, 1, 2), (3, 7, 37), (2, 150, 64), (5, 1, 130), (2, 3, 5000))
# B, C, S, groups: the same for groups; one group; an instance norm; one position
GROUPED = ((1, 1, 2, 1), (3, 6, 37, 3), (2, 8, 300, 1), (2, 5, 130, 5), (4, 12, 1, 3))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The reference, and the C++ kernels where they are built."""
    if request.param == "cpp" and not extension().available:
        pytest.skip(extension().reason)
    with use_backend(request.param):
        yield request.param


def draw(*shape, dtype=torch.float64):
    """x with a mean far from 0, b, and a weight and bias of one copy a sample."""
    g = torch.Generator().manual_seed(sum(shape))
    x, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in "xb")
    return (3 + 2 * x).to(dtype), b.to(dtype)


def by_autograd(norm, x, b, channels):
    """Gradients of a weight and bias that every sample has of its own, in float64."""
    x, b = x.double(), b.double()
    weight = torch.ones(len(x), channels, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(x), channels, dtype=torch.float64, requires_grad=True)
    rows = [norm(x[i : i + 1], weight[i], bias[i]) for i in range(len(x))]
    return torch.autograd.grad(torch.cat(rows), [weight, bias], b)


def rms_norm(x, weight, bias, eps):
    return F.rms_norm(x, weight.shape, weight, eps) + bias


def layer_norm_truth(x, b, *, eps, centered=True):
    def norm(x, w, c):
        return F.layer_norm(x, w.shape, w, c, eps) if centered else rms_norm(x, w, c, eps)

    return by_autograd(norm, x, b, x.shape[2])


def assert_as_exact(results, rivals, truths, dtype):
    for result, rival, truth in zip(results, rivals, truths, strict=True):
        assert result.dtype == dtype
        if dtype == torch.float64:
            assert relative(result, truth) < 1e-13  # observed 3e-15
        else:
            assert error_ratio(result, rival, truth, dtype) <= 2  # observed 1.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm(backend, shape, centered, dtype):
    x, b = draw(*shape, dtype=dtype)
    results = layer_norm_sample_gradients(x, b, eps=1e-3, centered=centered)
    with use_backend("reference"):
        rivals = layer_norm_sample_gradients(x, b, eps=1e-3, centered=centered)
    truths = layer_norm_truth(x, b, eps=1e-3, centered=centered)
    assert_as_exact(results, rivals, truths, dtype)
    alone, none = layer_norm_sample_gradients(x, b, eps=1e-3, centered=centered, bias=False)
    assert none is None
    assert_bitwise(alone, results[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("case", GROUPED)
def test_group_norm(backend, case, statistics, dtype):
    *shape, groups = case
    x, b = draw(*shape, dtype=dtype)
    moments = {}
    if statistics:
        moments = {"mean": x.mean((0, 2)), "variance": x.square().mean((0, 2))}

    def norm(x, weight, bias):
        if statistics:
            values = (moments[name].double() for name in ("mean", "variance"))
            return F.batch_norm(x, *values, weight, bias, eps=1e-3)
        # a group of one entry, which torch's group_norm refuses, is normalised to 0
        normalized = F.layer_norm(x.view(groups, -1), (x.numel() // groups,), eps=1e-3)
        return normalized.view(x.shape) * weight[:, None] + bias[:, None]

    results = group_norm_sample_gradients(x, b, groups, eps=1e-3, **moments)
    with use_backend("reference"):
        rivals = group_norm_sample_gradients(x, b, groups, eps=1e-3, **moments)
    assert_as_exact(results, rivals, by_autograd(norm, x, b, shape[1]), dtype)


def test_many_positions_lose_no_digits(backend):
    """Sums of one sign over 40,000 positions, of x far from 0."""
    x, b = draw(1, 40_000, 8, dtype=torch.float32)
    rows = x + 1000, b.abs()
    across = [t.mT.contiguous() for t in rows]
    for ours, pair in (
        (layer_norm_sample_gradients, rows),
        (lambda x, b: group_norm_sample_gradients(x, b, 2), across),
    ):
        with use_backend("reference"):
            truths, rivals = ours(*(t.double() for t in pair)), ours(*pair)
        assert_as_exact(ours(*pair), rivals, truths, torch.float32)


def test_strides_are_those_of_the_tensor(backend):
    x, b = draw(4, 6, 70)
    strided = [torch.stack([t, -t], 2)[:, :, 0] for t in (x, b)]
    expanded = b[:1, :1].expand(b.shape)
    for ours in (layer_norm_sample_gradients, lambda *t: group_norm_sample_gradients(*t, 3)):
        assert_bitwise(ours(*strided), ours(x, b))
        assert_bitwise(ours(x, expanded), ours(x, expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6)])
def test_no_samples_and_no_positions(backend, shape):
    x = torch.ones(shape)
    for sums in layer_norm_sample_gradients(x, x):
        assert_bitwise(sums, torch.zeros(shape[0], shape[2]))
    across = x.transpose(1, 2)
    for sums in group_norm_sample_gradients(across, across, 2):
        assert_bitwise(sums, torch.zeros(shape[0], shape[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(backend, dtype):
    x, b = draw(3, 7, 40, dtype=dtype)
    results = layer_norm_sample_gradients(x, b)
    for result, truth in zip(results, layer_norm_truth(x, b, eps=1e-5), strict=True):
        assert result.dtype == torch.float32
        assert relative(result, truth) < 1e-6  # observed 2e-7


def test_nothing_of_the_caller_is_changed(backend):
    x, b = draw(3, 7, 40)
    before = x.clone(), b.clone()
    layer_norm_sample_gradients(x, b)
    group_norm_sample_gradients(x, b, 7)
    assert_bitwise((x, b), before)


@pytest.mark.skipif(not extension().available, reason=extension().reason)
def test_where_auto_takes_the_kernel():
    """Contiguous float32 and float64; group norms from 128 positions on."""
    long, short = torch.ones(2, 4, 128), torch.ones(2, 4, 127)
    assert kernel_for(LAYER_NORM, [short, short]) is not None
    assert kernel_for(LAYER_NORM, [short.half(), short.half()]) is None
    assert kernel_for(LAYER_NORM, [short, short.double()]) is None
    assert kernel_for(LAYER_NORM, [short, short.mT.contiguous().mT]) is None
    assert kernel_for(GROUP_NORM, [long, long]) is not None
    assert kernel_for(GROUP_NORM, [short, short]) is None


@pytest.mark.skipif(not extension().available, reason=extension().reason)
def test_opcheck():
    """torch's own checks of schema, fake kernels and dispatch."""
    x, b = draw(2, 4, 70)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    check = lambda op, *x: torch.library.opcheck(op, x, test_utils=tests)  # noqa: E731
    check(torch.ops.mts_fast.layer_norm_sample_gradients, x, b, 1e-5, True, True)
    check(torch.ops.mts_fast.layer_norm_sample_gradients, x, b, 1e-5, False, False)
    check(torch.ops.mts_fast.group_norm_sample_gradients, x, b, 2, 1e-5, None, None)
    check(
        torch.ops.mts_fast.group_norm_sample_gradients, x, b, 2, 1e-5, x[0, :, 0], b[0, :, 0].abs()
    )


X = torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], X), ValueError, "x must be 3-dim"),
        ((X, X.long()), TypeError, "b must be a floating"),
        ((X, X[:1]), ValueError, r"b must be \[B, T, C\] of x's shape \(2, 4, 6\)"),
        ((X, X.to("meta")), ValueError, "b must be on cpu like x"),
        ((X, X, {"eps": -1.0}), ValueError, "eps must be a finite number at least 0"),
        ((X, X, {"centered": 1}), TypeError, "centered must be True or False"),
        ((X, X, {"bias": None}), TypeError, "bias must be True or False"),
    ],
)
def test_layer_norm_errors_name_the_argument(arguments, error, message):
    *tensors, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=f"layer_norm_sample_gradients: {message}"):
        layer_norm_sample_gradients(*tensors, **options)


@pytest.mark.parametrize(
    ("groups", "options", "error", "message"),
    [
        (3, {}, ValueError, "groups must be a divisor of the 4 channels of x, got 3"),
        (0, {}, ValueError, "groups must be a positive int"),
        (2.0, {}, TypeError, "groups must be a positive int"),
        (2, {"eps": "1"}, TypeError, "eps must be a finite number"),
        (2, {"mean": X[0, :, 0]}, ValueError, "variance must be a tensor, as mean is, got None"),
        (2, {"variance": X[0, :, 0]}, ValueError, "mean must be a tensor, as variance is"),
        (2, {"mean": X[0], "variance": X[0]}, ValueError, "mean must be 1-dim"),
        (2, {"mean": X[0, 0], "variance": X[0, 0]}, ValueError, "mean must be of length 4"),
    ],
)
def test_group_norm_errors_name_the_argument(groups, options, error, message):
    with pytest.raises(error, match=f"group_norm_sample_gradients: {message}"):
        group_norm_sample_gradients(X, X, groups, **options)
