"""Loss scaling under float16 autocast: small gradients survive, overflows skip the step."""

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from torch import nn

import mts_fast


def fitted(device):
    """A classifier that fits well: its cotangents lie below float16's smallest number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    centres = torch.randn(3, 8, device=device) * 3
    y = torch.arange(2048, device=device) % 3
    x = centres[y] + 0.3 * torch.randn(2048, 8, device=device)
    warm = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        warm.zero_grad()
        F.cross_entropy(model(x), y).backward()
        warm.step()
    return model, x, y


def built(model, **options):
    torch.manual_seed(1)
    selector = mts_fast.Selector(0, 3, hidden=(8,)).to(next(model.parameters()).device)
    return mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=1e-2),
        online_features=False,
        **options,
    )


def true_gradient(model, x, y, p):
    losses = F.cross_entropy(model(x), y, reduction="none")
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad((p * losses).sum(), list(model.parameters()))]
    )


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("engine", ["ghost", "forward_mode", "double_backward"])
@pytest.mark.parametrize("creates_scaler", [True, False])
def test_small_gradients_survive(creates_scaler, engine, device):
    model, x, y = fitted(device)
    scaler = None if creates_scaler else torch.amp.GradScaler(device.type, init_scale=2.0**14)
    step = built(model, scaler=scaler, engine=engine)
    reference = built(nn.Sequential(*[m for m in model]), engine=engine)
    w = reference.weights(x, y, val_inputs=x[:9])
    expected = true_gradient(model, x, y, w / w.sum())
    with torch.autocast(device.type, torch.float16):
        result = step(x, y, val_inputs=x[:9], val_labels=y[:9])
    assert not result.skipped and step.skipped_steps == 0
    assert relative(gradient(model), expected) < 0.05  # float16; observed 0.004
    assert result.self_check < 2e-2
    assert step.scaler is scaler or creates_scaler


def test_the_scaled_step_is_the_unscaled_one(device):
    """In float32 the scale, a power of two, cancels up to rounding."""
    model, x, y = fitted(device)
    import copy

    plain, scaled = (
        built(copy.deepcopy(model)),
        built(copy.deepcopy(model), scaler=torch.amp.GradScaler(device.type, init_scale=2.0**10)),
    )
    for _ in range(3):
        a = plain(x, y, val_inputs=x[:9], val_labels=y[:9])
        b = scaled(x, y, val_inputs=x[:9], val_labels=y[:9])
        assert relative(b.dots, a.dots) < 1e-4  # observed 2e-6
    for p, q in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert relative(q, p) < 1e-6


def test_an_overflow_skips_the_step_and_is_counted(device):
    model, x, y = fitted(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    step = built(model, scaler=scaler)
    before = [p.clone() for p in (*model.parameters(), *step.selector.parameters())]
    # the scale overflows float16 in the backward
    with torch.autocast(device.type, torch.float16):
        result = step(x, y, val_inputs=x[:9], val_labels=y[:9])
    assert result.skipped and step.skipped_steps == 1 and step.steps == 1
    after = [*model.parameters(), *step.selector.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() == 2.0**59
    for _ in range(60):
        with torch.autocast(device.type, torch.float16):
            result = step(x, y, val_inputs=x[:9], val_labels=y[:9])
        if not result.skipped:
            break
    assert not result.skipped and step.skipped_steps > 1
    assert not torch.equal(before[0], next(model.parameters()))


def test_the_scaler_is_in_the_state(device):
    model, x, y = fitted(device)
    step = built(model)
    with torch.autocast(device.type, torch.float16):
        step(x, y, val_inputs=x[:9], val_labels=y[:9])
    state = step.state_dict()
    assert state["scaler"]["_growth_tracker"] == 1
    other = built(fitted(device)[0])
    other.load_state_dict(state)
    assert other.scaler.state_dict() == step.scaler.state_dict()
    for run in (step, other):
        with torch.autocast(device.type, torch.float16):
            run(x, y, val_inputs=x[:9], val_labels=y[:9])
    for p, q in zip(step.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_clipping_sees_the_unscaled_gradient(device):
    model, x, y = fitted(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    step = built(model, scaler=scaler, max_grad_norm=1e-3)
    step(x, 2 - y, val_inputs=x[:9], val_labels=y[:9])
    assert abs(gradient(model).norm().item() - 1e-3) < 1e-6


@pytest.mark.parametrize("engine", ["ghost", "forward_mode", "double_backward"])
def test_directions_below_float16_keep_their_digits(engine):
    """kappa v of 1e-9 is no float16 number; the dots are as those of float32."""
    dots = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        selector = mts_fast.Selector(0, 3, hidden=(4,))
        step = mts_fast.MTSStep(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-8),
            selector,
            torch.optim.SGD(selector.parameters(), lr=0.1),
            engine=engine,
            online_features=False,
        )
        x, y = torch.randn(12, 6), torch.arange(12) % 3
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            dots.append(step(x, y, val_inputs=x[:6], val_labels=y[:6]).dots)
    assert torch.cosine_similarity(dots[1], dots[0], dim=0) > 0.999
    torch.testing.assert_close(dots[1].norm(), dots[0].norm(), rtol=2e-2, atol=0)
