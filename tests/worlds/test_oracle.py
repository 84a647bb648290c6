"""The oracle of the worlds against torch's own optimizers, and differences of a whole step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from worlds.builders import ColumnSelector, build, draw_batch
from worlds.generators import drawing_from
from worlds.in_double import Snapshot, copied
from worlds.oracle import Truth
from worlds.sampling import sample
from worlds.strategy import ESTIMATORS
from worlds.update_rules import updated

# worlds of the differences, and of the second derivative
DIFFERENCES, SECOND = 60, 25


def plain_val_loss(truth, before, p):
    """Forward, backward and torch's own optimizer step by weights p; the validation loss then."""
    objects = copied(before.objects)
    for module in objects.model.modules():
        if hasattr(module, "reentrant"):
            module.enabled = False
    with drawing_from(before.generators):
        parts = p.split(truth.world.step["micro_batch"] or len(p))
        for part, chunk in zip(parts, truth.chunks(truth.train), strict=True):
            losses = truth.losses_of(objects.model, objects.loss, *chunk)
            (part * losses).sum().backward()
        objects.optimizer.step()
        for module in (objects.model, objects.loss):
            if isinstance(module, nn.Module):
                module.train(truth.world.step["validation_mode"] == "train")
        with torch.no_grad():
            losses = [
                truth.losses_of(objects.model, objects.loss, *chunk)
                for chunk in truth.chunks(truth.val)
            ]
    return torch.cat(losses).mean(), objects


def second_call(world):
    """(truth, snapshot) of a call that finds state in the optimizer."""
    objects = build(world, ColumnSelector)
    calls = []
    for call in range(2):
        train = draw_batch(world, call, "train", world.batches["sizes"][call])
        val = draw_batch(world, call, "validation", world.batches["validation"])
        before = Snapshot.take(world, objects, {}, 0)
        truth = Truth(before, train, val, None, double=True)
        calls.append((truth, before))
        if call == 0:
            _, objects = plain_val_loss(truth, before, truth.p)
            objects.model.train()
            if isinstance(objects.loss, nn.Module):
                objects.loss.train()
            objects.optimizer.zero_grad()
    return calls[1]


def in_float64(world):
    """The world in float64, every call of it with a selector step on its own batch."""
    step = {**world.step, "hypergradient_lr": None, "selector_every": 1, "online_features": False}
    optimizer = dict(world.optimizer)
    if optimizer["kind"] != "SGD":
        # a gradient of rounding noise (a bias before BatchNorm) is multiplied by lr / eps
        optimizer["eps"] = 1e-4
    batches = {**world.batches, "selector_batch": 0}
    return replace(world, precision="float64", step=step, optimizer=optimizer, batches=batches)


def is_derivative(world):
    """Whether autograd's gradients are the derivatives of the forward."""
    kinds = {layer["kind"] for layer in world.layers}
    odd = ESTIMATORS | {"spectral_norm"}
    if world.step["validation_mode"] == "train":
        # running statistics that move from one micro-batch to the next carry no gradient
        odd |= {"running_centre"}
        if world.loss.startswith("running"):
            return False
    return not kinds & odd and not (set(world.head["embedding"]) - {"sparse"})


def is_differentiable_twice(world):
    """Whether functional_call and autograd's second derivative serve it."""
    kinds = {layer["kind"] for layer in world.layers}
    return (
        world.source in ("vector", "sequence", "tokens")
        and world.optimizer["kind"] == "SGD"
        and world.step["micro_batch"] is None
        and not world.head["embedding"]
        and not kinds & {"gru", "lstm", "spectral_norm", "checkpoint"}
    )


def test_dots_are_central_differences_of_the_whole_step():
    """float64, h = 1e-6: observed at most 3e-6 of the largest, beside the rounding of L itself."""
    worlds = [w for w in map(in_float64, sample(3 * DIFFERENCES, 11)) if is_derivative(w)]
    for world in worlds[:DIFFERENCES]:
        truth, before = second_call(world)
        slopes = []
        h = 1e-6
        for i in range(len(truth.p)):
            unit = torch.zeros_like(truth.p)
            unit[i] = h
            above, below = (
                plain_val_loss(truth, before, truth.p + s * unit)[0].item() for s in (1, -1)
            )
            slopes.append(-(above - below) / (2 * h))
        error = (torch.tensor(slopes, dtype=torch.float64) - truth.dots).abs().max().item()
        rounding = 1e-15 * abs(truth.val_loss.item()) / h
        assert error < 1e-4 * truth.dots.abs().max().item() + 20 * rounding, world.to_json()
        at_p, _ = plain_val_loss(truth, before, truth.p)
        # torch computes with a learning rate in a tensor, and NAdam's momenta, in float32
        single = world.optimizer["lr_tensor"] or world.optimizer["kind"] == "NAdam"
        rtol = 1e-6 if single else 1e-10
        torch.testing.assert_close(at_p, truth.val_loss, rtol=rtol, atol=1e-10)


def test_dots_are_the_second_derivative_where_gradients_are_estimates():
    """Straight-through weights, gradient reversal, detached branches: autograd of autograd."""
    worlds = [w for w in map(in_float64, sample(8 * SECOND, 12)) if is_differentiable_twice(w)]
    assert len(worlds) >= SECOND
    for k, world in enumerate(worlds[:SECOND]):
        odd = {"kind": sorted(ESTIMATORS)[k % len(ESTIMATORS)]}
        world = replace(world, layers=[*world.layers, odd])
        truth, before = second_call(world)
        objects = copied(before.objects)
        names = {id(p): n for n, p in objects.model.named_parameters()}
        rows = [
            (p, group, objects.optimizer.state.get(p, {}))
            for group in objects.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        p = truth.p.clone().requires_grad_()
        with drawing_from(before.generators), sdpa_kernel(SDPBackend.MATH):
            losses = truth.losses_of(objects.model, objects.loss, *truth.chunks(truth.train)[0])
            g = torch.autograd.grad(
                (p * losses).sum(), [q for q, *_ in rows], create_graph=True, allow_unused=True
            )
            theta = {}
            for (q, group, state), dq in zip(rows, g, strict=True):
                group = {**group, "lr": float(group["lr"])}
                theta[names[id(q)]] = q if dq is None else updated(q, dq, group, state, "SGD")[0]
            for module in (objects.model, objects.loss):
                if isinstance(module, nn.Module):
                    module.train(world.step["validation_mode"] == "train")

            def swapped(*args, model=objects.model, theta=theta, **kwargs):
                return functional_call(model, theta, args, kwargs)

            losses = truth.losses_of(swapped, objects.loss, *truth.chunks(truth.val)[0])
        d = -torch.autograd.grad(losses.mean(), p)[0]
        error = (d - truth.dots).abs().max()
        # observed 1e-15
        assert error <= 1e-10 * truth.dots.abs().max() + 1e-18, world.to_json()


OPTIMIZERS = {
    "SGD": [
        {},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
    ],
    "Adam": [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True, "eps": 1e-3}],
    "AdamW": [{}, {"amsgrad": True, "betas": (0.7, 0.8)}],
    "NAdam": [{}, {"weight_decay": 0.1}],
    "RAdam": [{}, {"weight_decay": 0.1}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}],
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_update_rules_are_torchs(kind):
    """Ten steps, so that RAdam leaves its warm-up and amsgrad's maximum its current value."""
    for options in OPTIMIZERS[kind]:
        theta = nn.Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = getattr(torch.optim, kind)([theta], lr=0.05, **options)
        for k in range(10):
            theta.grad = torch.randn(5, dtype=torch.float64) / (1 + k)
            state = copy.deepcopy(dict(optimizer.state.get(theta, {})))
            group = optimizer.param_groups[0]
            ours, new, _ = updated(theta.detach().clone(), theta.grad, group, state, kind)
            optimizer.step()
            # observed 4e-16, but torch keeps NAdam's product of momenta in float32
            atol = 1e-8 if kind == "NAdam" else 1e-14
            torch.testing.assert_close(theta.detach(), ours, rtol=1e-13, atol=atol)
            for name, value in new.items():
                theirs = torch.as_tensor(optimizer.state[theta][name], dtype=torch.float64)
                value = torch.as_tensor(value, dtype=torch.float64)
                # mu_product is kept in float32
                torch.testing.assert_close(theirs, value, rtol=1e-6, atol=1e-14)
