"""Weight statistics and GSNR against numpy, against explicit loops, and against known truths."""

import numpy as np
import pytest
import torch
from comparison import assert_bitwise, generators, relative
from models import CLASSES
from step_run import StepRun

import mts_fast
from mts_fast.diagnostics import GSNRMeter, selector_gsnr, weight_statistics


# float64 checks the formulas; float32 is the dtype in use, and sums of 50 terms round to 1e-6.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 50])  # one sample has no variance
def test_weight_statistics_equal_numpy(size, dtype, device):
    w = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
    p = w / w.sum()
    statistics = weight_statistics(w.requires_grad_(), p).read()
    wn, pn = w.detach().cpu().numpy().astype(float), p.detach().cpu().numpy().astype(float)
    expected = {
        "mean_weight": wn.mean(),
        "max_p": pn.max(),
        "var_p": pn.var(),
        "effective_batch_size": 1 / (pn**2).sum(),
    }
    assert list(statistics) == list(expected)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6  # observed 4e-16 and 2e-7
    assert statistics == pytest.approx(expected, rel=tolerance, abs=1e-16)


@pytest.mark.parametrize("counting", [1, 4, 20])  # all weight on one; on a fifth; on everyone
def test_effective_batch_size_counts_the_samples_that_count(counting):
    w = torch.zeros(20)
    w[:counting] = 0.5
    statistics = weight_statistics(w, w / w.sum()).read()
    assert statistics["effective_batch_size"] == pytest.approx(counting, rel=1e-6)
    assert statistics["max_p"] == pytest.approx(1 / counting, rel=1e-6)
    assert statistics["mean_weight"] == pytest.approx(counting / 40, rel=1e-6)


W = torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W.long(), W), TypeError, "weights must be a floating"),
        ((W[:0], W[:0]), ValueError, "weights must be non-empty"),
        ((W[None], W), ValueError, "weights must be 1-dim"),
        ((W, W[:2]), ValueError, "p must be of length 3"),
        ((W, [1.0]), TypeError, "p must be a tensor"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"weight_statistics: {message}"):
        weight_statistics(*arguments)


def numpy_gsnr(observations, pooled=1):
    """pooled * (mean^2 - var/n) / var, averaged over the parameters that vary; [n, P]."""
    n = len(observations)
    mean, variance = observations.mean(0), observations.var(0, ddof=1)
    varies = variance > 0
    ratio = pooled * (mean**2 - variance / n)[varies] / variance[varies]
    return ratio.mean()


def draws(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(3, 2, generator=g, dtype=torch.float64) + 1, torch.randn(4, generator=g) * 3]
        for _ in range(n)
    ]


@pytest.mark.parametrize("pooled", [1, 8])  # of one observation; of a mean of them
@pytest.mark.parametrize("n", [2, 30])  # least; many
def test_meter_equals_numpy_on_the_stack(n, pooled, device):
    meter = GSNRMeter()
    stack = []
    for gradient in draws(n):
        gradient = [g.to(device) for g in gradient]
        gradient[1][2] = 7.0  # a parameter that never varies is left out
        meter.update(gradient)
        stack.append(np.concatenate([g.double().cpu().numpy().ravel() for g in gradient]))
    assert meter.count == n
    # observed 3e-16
    expected = numpy_gsnr(np.stack(stack), pooled)
    assert meter.value(pooled=pooled).item() == pytest.approx(expected, rel=1e-12)


def test_meter_is_exact_on_a_large_offset():
    """Mean 1e8, standard deviation about 1: sums of squares would cancel every digit."""
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) + 1e8
    meter = GSNRMeter()
    for value in values:
        meter.update([value])
    variance = 7 / 3  # of 1, 2, 4
    expected = (values.mean().item() ** 2 - variance / 3) / variance
    assert meter.value().item() == pytest.approx(expected, rel=1e-7)  # observed 2e-9


def test_meter_needs_two_observations_of_one_shape():
    meter = GSNRMeter()
    assert meter.value().isnan()
    meter.update([torch.ones(2)])
    assert meter.value().isnan()
    for bad in ([torch.ones(3)], [torch.ones(2), torch.ones(1)], []):
        with pytest.raises(ValueError, match=r"gradient must be of shapes \[\(2,\)\]"):
            meter.update(bad)
    assert meter.count == 1


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (None, TypeError, "gradient must be a list of tensors, got NoneType"),
        (W, TypeError, "gradient must be a list of tensors, got a float32 tensor"),
        ([], ValueError, "gradient must be of at least one tensor"),
        ([W, None], TypeError, r"gradient\[1\] must be a .*, got None; pass zeros for a parameter"),
        ([W, [1.0]], TypeError, r"gradient\[1\] must be a tensor"),
        ([W, W.int()], TypeError, r"gradient\[1\] must be a floating-point tensor"),
        ([W, W / 0], ValueError, r"gradient\[1\] must be finite, .*; leave this observation out"),
    ],
)
def test_refused_observations_count_nothing(gradient, error, message):
    meter = GSNRMeter()
    with pytest.raises(error, match=f"GSNRMeter.update: {message}"):
        meter.update(gradient)
    for value in (1, 2, 4):
        meter.update(value * g for g in (W, W))
    before = meter.value().item()
    with pytest.raises(error):
        meter.update(gradient)
    assert meter.count == 3 and meter.value().item() == before


@pytest.mark.parametrize(("pooled", "error"), [(0, ValueError), ("8", TypeError), (2.5, TypeError)])
def test_refused_pools(pooled, error):
    with pytest.raises(error, match=r"GSNRMeter\.value: pooled must be a positive int"):
        GSNRMeter().value(pooled=pooled)


@pytest.mark.parametrize(
    ("mean", "n", "spread"),
    # few draws; many without signal, where squared noise would look like signal; many with signal.
    # `spread` is the standard deviation of one estimate, simulated.
    [(0.5, 8, 0.84), (0.0, 400, 0.0036), (0.5, 100, 0.112)],
)
def test_meter_takes_the_noise_out_of_the_squared_mean(mean, n, spread):
    """4000 parameters of variance 1, so that the truth is mean^2.

    E[m^2/s^2 - 1/n] = (mean^2 + 1/n)(n - 1)/(n - 3) - 1/n for normal draws: the factor is that of
    1/s^2. The naive ratio is 1/n larger.
    """
    repeats = 4000
    g = torch.Generator().manual_seed(0)
    meter = GSNRMeter()
    for _ in range(n):
        meter.update([torch.randn(repeats, generator=g, dtype=torch.float64) + mean])
    expected = (mean**2 + 1 / n) * (n - 1) / (n - 3) - 1 / n
    tolerance = 4 * spread / repeats**0.5
    assert tolerance < 1 / n  # the naive ratio would not pass
    assert abs(meter.value().item() - expected) < tolerance
    if n >= 100:
        assert abs(meter.value().item() - mean**2) < tolerance + 3 * mean**2 / n


def selector_batch(device):
    torch.manual_seed(3)
    selector = mts_fast.Selector(4, CLASSES, hidden=(6,)).to(device, torch.float64)
    g = torch.Generator().manual_seed(4)
    h = torch.randn(9, 4, generator=g, dtype=torch.float64).to(device)
    classes = torch.randint(CLASSES - 1, (9,), generator=g).to(device)  # the last one is absent
    cotangent = torch.randn(9, generator=g, dtype=torch.float64).to(device) / 9
    return selector, (h, classes, torch.arange(9, device=device) % 2 == 0), cotangent


def contributions(selector, inputs, cotangent):
    """c_i = cotangent_i dz_i/dphi, a backward for each sample; [B, P]."""
    rows = []
    for i in range(len(cotangent)):
        z = selector(*(x[i : i + 1] for x in inputs))
        grads = torch.autograd.grad(cotangent[i] * z.sum(), list(selector.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).cpu().numpy())
    return np.stack(rows).astype(float)


def test_selector_gsnr_equals_a_loop(device):
    selector, inputs, cotangent = selector_batch(device)
    rows = contributions(selector, inputs, cotangent)
    # the rows of the absent class never vary; they must not count as zeros
    assert (rows.var(0) == 0).sum() >= 4
    gsnr = selector_gsnr(selector, inputs, cotangent).item()
    # the gradient is 9 times the mean contribution: observed 4e-16
    assert gsnr == pytest.approx(numpy_gsnr(rows, pooled=9), rel=1e-12)
    meter = GSNRMeter()
    for row in rows:
        meter.update([torch.from_numpy(row)])
    assert meter.value(pooled=9).item() == pytest.approx(gsnr, rel=1e-12)


def test_selector_gsnr_of_frozen_parts_and_logit_columns(device):
    """A custom selector that returns [B, 1] and has a frozen layer."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 5)
            self.last = torch.nn.Linear(5, 1)
            self.first.requires_grad_(False)

        def forward(self, h, classes, is_synthetic):
            return self.last(self.first(h).tanh())

    _, inputs, cotangent = selector_batch(device)
    selector = Own().to(device, torch.float64)
    hidden = selector.first(inputs[0]).tanh()
    rows = torch.cat([hidden * cotangent[:, None], cotangent[:, None]], dim=1)
    expected = numpy_gsnr(rows.cpu().numpy(), pooled=9)
    assert selector_gsnr(selector, inputs, cotangent).item() == pytest.approx(expected, rel=1e-12)


def test_selector_with_dropout_leaves_the_generators(device):
    """Dropout draws a mask per sample, so only a dropout of 0 is compared with the exact GSNR."""
    _, inputs, cotangent = selector_batch(device)

    def selector_with(share):
        torch.manual_seed(0)
        layers = (torch.nn.Linear(4, 5), torch.nn.Dropout(share), torch.nn.Linear(5, 1))
        return Features(torch.nn.Sequential(*layers).to(device, torch.float64))

    expected = numpy_gsnr(contributions(selector_with(0.0), inputs, cotangent), pooled=9)
    assert selector_gsnr(selector_with(0.0), inputs, cotangent).item() == pytest.approx(
        expected, rel=1e-12
    )
    selector = selector_with(0.5)
    before = generators(device)
    noisy = selector_gsnr(selector, inputs, cotangent)
    assert_bitwise(generators(device), before)
    assert noisy.isfinite() and noisy.item() != pytest.approx(expected, rel=1e-3)


class Features(torch.nn.Module):
    """A selector that ignores classes and sources."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, h, classes, is_synthetic):
        return self.layers(h)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, i, c: (None, i, c), TypeError, "selector must be a torch.nn.Module"),
        (lambda s, i, c: (s, i[0], c), TypeError, "inputs must be a sequence of tensors"),
        (lambda s, i, c: (s, (*i[:2], 3), c), TypeError, r"inputs\[2\] must be a tensor"),
        (lambda s, i, c: (s, (i[0], i[1][:2], i[2]), c), ValueError, r"inputs\[1\] must be of len"),
        (lambda s, i, c: (s, i, c.long()), TypeError, "cotangent must be a floating"),
        (
            lambda s, i, c: (Features(torch.nn.BatchNorm1d(4)), i, c),
            ValueError,
            r"selector must be without batch statistics, got modules \['layers'\]; use LayerNorm",
        ),
    ],
)
def test_refused_selectors(change, error, message):
    with pytest.raises(error, match=f"selector_gsnr: {message}"):
        selector_gsnr(*change(*selector_batch("cpu")))


@pytest.mark.parametrize("two_batches", [False, True])
def test_step_tracks_the_gsnr_of_its_selector_gradient(two_batches, device):
    run = StepRun(
        device, dtype=torch.float64, engine="forward_mode", online_features=False, track_gsnr=True
    )
    arguments = run.arguments(0, two_batches=two_batches)
    used = vars(arguments["selector_batch"]) if two_batches else arguments
    inputs = tuple(used[k] for k in ("features", "labels", "is_synthetic"))
    z = run.selector(*inputs)
    before = [p.detach().clone() for p in run.selector.parameters()]
    result = run.step(**arguments)
    p = mts_fast.normalize_weights(z.detach())
    cotangent = mts_fast.selector_gradient(result.dots, z.detach(), p)
    gradient = [q.grad.clone() for q in run.selector.parameters()]
    for q, old in zip(run.selector.parameters(), before, strict=True):
        q.data.copy_(old)
    rows = contributions(run.selector, inputs, cotangent)
    # the contributions sum to the gradient of the step; observed 2e-16
    total = torch.from_numpy(rows.sum(0)).to(device)
    assert relative(total, torch.cat([g.flatten() for g in gradient])) < 1e-12
    expected = numpy_gsnr(rows, pooled=len(rows))
    assert result.gsnr.item() == pytest.approx(expected, rel=1e-9)  # observed 1e-13
    assert not StepRun(device).step.track_gsnr


def test_step_without_tracking_has_none(device):
    run = StepRun(device, selector_every=2, track_gsnr=True)
    assert run.step(**run.arguments(0)).gsnr is not None
    assert run.step(**run.arguments(1)).gsnr is None
    plain = StepRun(device)
    assert plain.step(**plain.arguments(0)).gsnr is None
