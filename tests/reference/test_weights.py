"""Weights and their cotangent: against decimals of 50 digits, and against autograd."""

from decimal import Decimal, getcontext

import pytest
import torch
from comparison import relative

import mts_fast
from mts_fast import reference

# each list is hard for one part of the computation in log space.
LOGITS = {
    "ordinary": [0.3, -1.2, 2.0, 0.0],
    "all_vanish": [-1e4, -1e4 - 1, -1e4 - 3],  # every w is 0 in floats, their ratios are not
    "all_saturate": [1e4, 2e4, 50.0],  # every w is 1
    "one_counts": [-1e4, 1e4, -50.0],
    "alone": [-1e4],  # p = 1 whatever w is
}
CLASS_WEIGHTS = {
    "without": None,
    "mixed": [2.0, 0.5, 1e-3, 1.0],
    "with_zeros": [0.0, 3.0, 0.0, 1.0],
}


def exact_weights(logits, class_weight=None):
    """p in decimals: w = c / (1 + exp(-z)), p = w / sum w."""
    getcontext().prec = 50
    c = [1.0] * len(logits) if class_weight is None else class_weight
    w = [Decimal(ci) / (1 + (-Decimal(zi)).exp()) for zi, ci in zip(logits, c, strict=True)]
    return torch.tensor([float(wi / sum(w)) for wi in w], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", CLASS_WEIGHTS)
@pytest.mark.parametrize("case", LOGITS)
def test_normalize_weights(case, weights, dtype, device):
    class_weight = CLASS_WEIGHTS[weights]
    if class_weight is not None:
        class_weight = class_weight[: len(LOGITS[case])]
    if class_weight == [0.0]:
        class_weight = [0.25]
    z = torch.tensor(LOGITS[case], dtype=dtype, device=device)
    c = None if class_weight is None else torch.tensor(class_weight, dtype=dtype, device=device)
    p = mts_fast.normalize_weights(z, class_weight=c)
    expected = exact_weights(z.tolist(), None if c is None else c.tolist())
    # a log w of -1e4 is rounded to 1e4 u once a class weight is added to it (observed 4e-5 in
    # float32); without one the differences of logits are exact (8e-8).
    rounded = z.abs().max().item() if c is not None and z.min() < -100 else 4.0
    assert relative(p.cpu(), expected) <= rounded * torch.finfo(dtype).eps
    if c is not None:
        assert (p[c == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_sample_counts_where_every_class_weight_is_zero(dtype, device):
    z = torch.tensor([1.0, -1e4, 1e4], dtype=dtype, device=device, requires_grad=True)
    p = mts_fast.normalize_weights(z, class_weight=torch.zeros_like(z))
    assert torch.equal(p, torch.zeros_like(p))
    d = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, device=device)
    assert torch.equal(mts_fast.selector_gradient(d, z, p).abs(), torch.zeros_like(p))
    part = mts_fast.normalize_weights(
        z, class_weight=torch.zeros_like(z), log_total=torch.tensor(-torch.inf, device=device)
    )
    assert torch.equal(part, torch.zeros_like(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", CLASS_WEIGHTS)
@pytest.mark.parametrize("case", [c for c in LOGITS if c != "alone"])
def test_two_parts_of_a_batch_make_the_whole(case, weights, dtype, device):
    """log S in float64 joins micro-batches; with it the mean dot product and the cotangent."""
    z = torch.tensor(LOGITS[case], dtype=dtype, device=device)
    c = None if CLASS_WEIGHTS[weights] is None else CLASS_WEIGHTS[weights][: len(z)]
    c = None if c is None else torch.tensor(c, dtype=dtype, device=device)
    d = torch.linspace(-1, 2, len(z), dtype=dtype, device=device)
    whole = mts_fast.normalize_weights(z, class_weight=c)
    whole_gradient = mts_fast.selector_gradient(d, z, whole)
    log_total = reference.log_weights(z, c).double().logsumexp(0)
    parts = [slice(0, 1), slice(1, None)]
    p = [
        mts_fast.normalize_weights(
            z[i], class_weight=None if c is None else c[i], log_total=log_total
        )
        for i in parts
    ]
    assert all(part.dtype == dtype for part in p)
    # log S of 1e4 rounds to 1e-12 in float64 and is subtracted there; observed 5e-13 and, in
    # float32, 9e-8. The cotangent takes a mean off, which costs a digit: observed 1.4e-6.
    tolerance = 4 * torch.finfo(dtype).eps + 1e-11
    assert relative(torch.cat(p), whole) <= tolerance
    mean_dot = sum((part * d[i]).sum() for part, i in zip(p, parts, strict=True))
    gradient = [
        mts_fast.selector_gradient(d[i], z[i], part, mean_dot=mean_dot)
        for part, i in zip(p, parts, strict=True)
    ]
    assert relative(torch.cat(gradient), whole_gradient) <= 10 * tolerance


@pytest.mark.parametrize("weights", CLASS_WEIGHTS)
@pytest.mark.parametrize("case", LOGITS)
def test_selector_gradient_is_the_derivative_of_the_weighted_loss(case, weights, device):
    """L_val falls by sum_i p_i(z) d_i to first order, so its cotangent is minus that derivative."""
    z = torch.tensor(LOGITS[case], dtype=torch.float64, device=device, requires_grad=True)
    c = None if CLASS_WEIGHTS[weights] is None else CLASS_WEIGHTS[weights][: len(z)]
    c = None if c is None else torch.tensor(c, dtype=torch.float64, device=device)
    d = torch.linspace(-1, 2, len(z), dtype=torch.float64, device=device)
    p = mts_fast.normalize_weights(z, class_weight=c)
    expected = -torch.autograd.grad((p * d).sum(), z)[0]
    gradient = mts_fast.selector_gradient(d, z.detach(), p.detach())
    # saturated logits have a gradient of 0; observed 2e-17 elsewhere.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_row_seven_in_terms_of_raw_weights(device):
    """dL_val/dw_j = -(d_j - sum p d)/S, as the paper has it, leads to the same logits' gradient."""
    z = torch.linspace(-2, 2, 7, dtype=torch.float64, device=device, requires_grad=True)
    c = torch.linspace(0.1, 2, 7, dtype=torch.float64, device=device)
    d = torch.cos(3 * z.detach())
    w = z.sigmoid() * c
    p = (w / w.sum()).detach()
    expected = torch.autograd.grad(w, z, -(d - (p * d).sum()) / w.detach().sum())[0]
    gradient = mts_fast.selector_gradient(d, z.detach(), p)
    assert relative(gradient, expected) < 1e-14  # observed 9e-16


Z, ONES = torch.zeros(3), torch.ones(3)
WEIGHTS = "normalize_weights: class_weight must be finite and at least 0, got values from"


def weights(class_weight, log_total=None):
    return mts_fast.normalize_weights(Z, class_weight=class_weight, log_total=log_total)


def test_values_are_not_checked_under_transforms():
    """vmap and torch.compile cannot trace code that reads a value."""
    z, c = torch.randn(4, 3), torch.rand(4, 3)
    call = lambda z, c: mts_fast.normalize_weights(z, class_weight=c)  # noqa: E731
    expected = torch.stack([call(*rows) for rows in zip(z, c, strict=True)])
    assert relative(torch.vmap(call)(z, c), expected) < 1e-6  # observed 1e-7
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert relative(compiled(z[0], c[0]), expected[0]) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mts_fast.normalize_weights([0.0]), TypeError, "logits must be a tensor"),
        (lambda: mts_fast.normalize_weights(Z.long()), TypeError, "logits must be a floating"),
        (lambda: mts_fast.normalize_weights(Z[:, None]), ValueError, "logits must be 1-dim"),
        (lambda: mts_fast.normalize_weights(Z[:0]), ValueError, "logits must be non-empty"),
        (
            lambda: mts_fast.normalize_weights(Z, class_weight=ONES.int()),
            TypeError,
            "class_weight must be a floating",
        ),
        (
            lambda: mts_fast.normalize_weights(Z, class_weight=ONES[:2]),
            ValueError,
            "class_weight must be of length 3",
        ),
        (lambda: weights(ONES * torch.tensor([1, -1, 1])), ValueError, WEIGHTS),
        (lambda: weights(ONES * torch.tensor([1, torch.nan, 1])), ValueError, WEIGHTS),
        (lambda: weights(ONES / 0), ValueError, WEIGHTS + ".*weight 0, not 1 / 0"),
        (lambda: weights(ONES.to("meta")), ValueError, "class_weight must be on cpu like logits"),
        (lambda: weights(None, 0.5), TypeError, "log_total must be a tensor, got float 0.5"),
        (lambda: weights(None, ONES), ValueError, "log_total must be 0-dim"),
        (lambda: weights(None, ONES[0] / 0), ValueError, "log_total must be a number or -inf"),
        (lambda: weights(None, ONES[0] * torch.nan), ValueError, "log_total must be a number"),
        (
            lambda: mts_fast.selector_gradient(Z.to("meta"), Z, Z),
            ValueError,
            "dots must be on cpu like logits",
        ),
        (
            lambda: mts_fast.selector_gradient(Z, Z, Z, mean_dot=0.5),
            TypeError,
            "mean_dot must be a tensor",
        ),
        (lambda: mts_fast.selector_gradient(Z, Z, Z.int()), TypeError, "p must be a floating"),
        (lambda: mts_fast.selector_gradient(Z[:2], Z, Z), ValueError, "dots must be of shape"),
        (lambda: mts_fast.selector_gradient(Z, Z, Z[:1]), ValueError, "p must be of shape"),
        (lambda: mts_fast.selector_gradient(Z, Z[None], Z), ValueError, "logits must be 1-dim"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
