"""kappa is 0 where the gradient is rounding noise, and nowhere else, on every backend."""

import math

import pytest
import torch
from comparison import assert_bitwise

import mts_fast
from mts_fast import reference, use_backend
from mts_fast.backends.registry import backend_reasons
from mts_fast.ops.virtual_update import optimizer_states
from mts_fast.reference.update_rules import is_noise, largest_gradient, noise_share

optim = torch.optim
ADAPTIVE = {
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
    "rmsprop_centered": lambda p: optim.RMSprop(p, lr=0.01, centered=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    # a beta2 with which the second moment is used after few steps
    "radam": lambda p: optim.RAdam(p, lr=0.01, betas=(0.9, 0.95)),
}


def stepped_optimizer(make, gradients, steps, device):
    """An optimizer over zeros after some steps with the same gradients."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = make(parameters)
    for _ in range(steps):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


def conv_bias_before_batch_norm(device):
    """Gradients of a convolution before BatchNorm, which cancels its bias: noise in the bias."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 36, 5),
    ).to(device)  # fmt: skip
    x = torch.randn(64, 3, 8, 8, generator=generator).to(device)
    y = torch.randint(5, (64,), generator=generator).to(device)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    names = [n for n, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("steps", [0, 8])  # before any state; where RAdam divides
@pytest.mark.parametrize("name", ADAPTIVE)
def test_bias_before_batch_norm_is_masked(name, steps, backend, device):
    gradients = conv_bias_before_batch_norm(device)
    noise = gradients["0.bias"]
    assert 0 < noise.abs().max() < 1e-6 * gradients["0.weight"].abs().max()
    optimizer = stepped_optimizer(ADAPTIVE[name], list(gradients.values()), steps, device)
    v = [torch.ones_like(g) for g in gradients.values()]
    update = mts_fast.virtual_update(optimizer, list(gradients.values()), along=v)
    scaled = update.scale(v)
    assert_bitwise(scaled, update.direction)
    if name == "radam" and not steps:  # nothing is divided in its first steps
        assert scaled.masked_entries == 0 and scaled[1].all()
        return
    scaled_by_name = dict(zip(gradients, scaled, strict=True))
    assert not scaled_by_name["0.bias"].any()
    # dead units of the ReLU have gradients of exactly 0; all other entries move
    exact_zeros = sum(int((g == 0).sum()) for g in gradients.values())
    assert scaled.masked_entries == update.direction.masked_entries == 8 + exact_zeros
    assert scaled.masked_entries.dtype == torch.int64 and scaled.masked_entries.ndim == 0
    assert sum(int((k == 0).sum()) for k in scaled) == 8 + exact_zeros
    assert all(k.any() for n, k in scaled_by_name.items() if n != "0.bias")


@pytest.mark.parametrize("name", [n for n in ADAPTIVE if n != "radam"])
def test_rare_embedding_row_is_not_masked(name, backend, device):
    """A row of 1e-5 of the largest gradient, beside rows without a gradient, after three steps."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(4, 3)
    table[1] = 1.0 + torch.rand(3, generator=generator)
    table[2] = 1e-5 * (1.0 + torch.rand(3, generator=generator))
    head = torch.rand(3, 3, generator=generator)
    gradients = [t.to(device) for t in (table, head)]
    if name == "rmsprop_centered":  # a constant gradient has no variance
        optimizer = stepped_optimizer(ADAPTIVE[name], [0.5 * g for g in gradients], 3, device)
    else:
        optimizer = stepped_optimizer(ADAPTIVE[name], gradients, 3, device)
    if name == "adamw":  # decoupled decay is not in the gradient
        assert optimizer.param_groups[0]["weight_decay"]
    scaled = mts_fast.virtual_update(optimizer, gradients).scale(
        [torch.ones_like(g) for g in gradients]
    )
    assert not scaled[0][[0, 3]].any() and scaled[0][[1, 2]].all() and scaled[1].all()
    assert scaled.masked_entries == 6


def test_sgd_masks_nothing(backend, device):
    gradients = [torch.tensor([1.0, 1e-12, 0.0], device=device)]
    optimizer = stepped_optimizer(lambda p: optim.SGD(p, lr=0.5), gradients, 0, device)
    scaled = mts_fast.virtual_update(optimizer, gradients).scale([torch.ones(3, device=device)])
    assert torch.equal(scaled[0], torch.full((3,), 0.5, device=device))
    assert scaled.masked_entries == 0
    assert mts_fast.virtual_update(optimizer, gradients).scale([None]).masked_entries == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_floor_is_one_for_all_parameters_and_of_each_dtype(dtype, backend, device):
    """The largest gradient may be in another parameter and dtype."""
    if backend == "cpp" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("its kernel takes float32 or float64")
    share = noise_share(dtype)
    # gradients of 16 bits are summed up in float32
    assert share == 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # large enough for float16 to hold the squares of the small entries
    size = 3e4
    entries = [size * share * factor for factor in (0.25, 0.5, 1.5, 2.0, 0.0)]
    gradients = [
        torch.tensor([size], device=device),
        torch.tensor(entries, dtype=torch.float64, device=device).to(dtype),
    ]
    # the state is empty, so that sqrt(v_hat) is |g|
    optimizer = stepped_optimizer(
        lambda p: optim.Adam([p[1]], lr=1.0, eps=0.5), gradients, 0, device
    )
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1, device=device))]})
    gradients.reverse()
    v = [torch.ones_like(g) for g in gradients]
    update = mts_fast.virtual_update(optimizer, gradients, along=v)
    assert (update.direction[0] != 0).tolist() == [False, False, True, True, False]
    assert update.direction.masked_entries == 3
    # without the largest gradient the floor is lower, and masks the exact zero only
    lone = stepped_optimizer(lambda p: optim.Adam(p, lr=1.0, eps=0.5), gradients[:1], 0, device)
    alone = mts_fast.virtual_update(lone, gradients[:1], along=v[:1]).direction
    assert (alone[0] != 0).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_mask_nothing(bad, backend, device):
    """They show in their own entry, and no small entry is masked because of them."""
    gradients = [
        torch.tensor([1.0, 1e-9, 0.0], device=device),
        torch.tensor([bad, 1.0], device=device),
    ]
    optimizer = stepped_optimizer(ADAPTIVE["adam"], gradients, 0, device)
    v = [torch.ones_like(g) for g in gradients]
    update = mts_fast.virtual_update(optimizer, gradients, along=v)
    for direction in (update.direction, update.scale(v)):
        assert direction[0][1] != 0 and direction[0][2] == 0
        assert direction[1][0].isnan() or not math.isnan(bad)
        assert direction.masked_entries == 1  # the exact zero
    assert not update.parameters[1][0].isfinite()


def test_bfloat16_parameters_keep_their_kappa(device):
    """Gradients of 1e-4 of the largest are not noise, although bfloat16's eps is larger."""
    gradients = [torch.logspace(0, -4, 9, device=device).bfloat16()]
    optimizer = stepped_optimizer(ADAPTIVE["adam"], gradients, 2, device)
    update = mts_fast.virtual_update(optimizer, gradients)
    assert update.scale(gradients)[0].all()


def test_nan_in_the_direction_shows_through_the_mask(backend, device):
    gradients = [torch.tensor([1.0, 0.0], device=device)]
    optimizer = stepped_optimizer(ADAPTIVE["adam"], gradients, 0, device)
    v = [torch.tensor([1.0, torch.nan], device=device)]
    assert mts_fast.virtual_update(optimizer, gradients).scale(v)[0][1].isnan()


def test_eps_of_zero_without_a_gradient(backend, device):
    """0/0 in theta', as in torch's own step; kappa is 0 there."""
    gradients = [torch.tensor([1.0, 0.0], device=device)]
    optimizer = stepped_optimizer(lambda p: optim.Adam(p, lr=0.1, eps=0.0), gradients, 0, device)
    update = mts_fast.virtual_update(optimizer, gradients, along=gradients)
    assert update.parameters[0].isnan().tolist() == [False, True]
    optimizer.param_groups[0]["params"][0].grad = gradients[0].clone()
    optimizer.step()
    real = optimizer.param_groups[0]["params"][0]
    assert real.isnan().tolist() == [False, True]
    assert update.direction[0][1] == 0


def test_the_oracle_masks_the_same_entries(device):
    """reference.kappa and mts_step's own call go through the same function."""
    gradients = [torch.tensor([1.0, 1e-9], device=device), torch.tensor([1e-9], device=device)]
    optimizer = stepped_optimizer(ADAPTIVE["adam"], gradients, 0, device)
    parameters = optimizer.param_groups[0]["params"]
    states = optimizer_states(optimizer)
    largest = largest_gradient(gradients)
    v = [torch.ones_like(g) for g in gradients]
    scaled = mts_fast.virtual_update(optimizer, gradients).scale(v)
    for p, g, w, kappa_v in zip(parameters, gradients, v, scaled, strict=True):
        exact = reference.kappa(p.detach(), g, states[p], None, largest)
        assert torch.equal(kappa_v, exact * w)
        assert torch.equal(is_noise(g.abs(), g, largest), exact == 0)
    assert reference.kappa(parameters[1].detach(), gradients[1], states[parameters[1]]).all()


def test_count_in_triton_is_that_of_its_kernel(device):
    """The kernel squares small float16 entries in float32, where the reference gets 0."""
    if backend_reasons("triton"):
        pytest.skip("; ".join(backend_reasons("triton")))
    gradients = [torch.tensor([1.0, 1e-5, 0.0], device=device).half()]
    optimizer = stepped_optimizer(ADAPTIVE["adam"], gradients, 0, device)
    v = [torch.full_like(gradients[0], 100.0)]
    with use_backend("triton"):
        scaled = mts_fast.virtual_update(optimizer, gradients).scale(v)
    assert scaled[0][1] != 0 and scaled.masked_entries == 1
