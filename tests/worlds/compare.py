"""What a call left behind against the truth, each quantity within what its dtype and engine allow.

Every tolerance is a share of the largest true entry, plus three times the error of plain torch in
the same dtype on the same world, plus what rounding of a gradient does to an optimizer that
divides by its root (Adam moves a parameter by lr whatever the size of a gradient of noise).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from worlds.builders import Objects
from worlds.generators import Generators
from worlds.in_double import Gradients
from worlds.oracle import Truth
from worlds.tolerances import (
    BETWEEN_CORNERS,
    CORNERS,
    DOUBLE_EPS,
    EPS,
    FEATURE_ROUNDINGS,
    LEEWAY,
    NEAR,
    NEAR_CORNERS,
    NOISE_SHARE,
    ROUNDINGS,
    SHARES,
    SINGLE,
    SINGLE_EPS,
    TAIL,
    TORCH_ERRORS,
    distance,
    double,
    largest_entry,
    weighted,
)
from worlds.update_rules import updated


@dataclass(frozen=True)
class Fault:
    """A quantity that is not what it must be."""

    quantity: str
    error: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.quantity}: error {self.error:.2e}, allowed {self.allowed:.2e}"


@dataclass(frozen=True)
class Call:
    """One call that gave a result."""

    result: Any
    objects: Objects  # as the call left them
    generators: Generators
    engine: str


class Comparison:
    """The truth, plain torch in the world's dtype, and how far apart they may be."""

    def __init__(self, truth: Truth, plain: Truth, rounded: Sequence[Truth], engine: str) -> None:
        """`rounded`: the truth at parameters off by a rounding, where one error says little."""
        self.truth, self.plain = truth, plain
        self.others = [plain, *rounded]
        precision = truth.world.precision
        exact, differences, self.share = SHARES[precision]
        self.dots_share = differences if engine == "finite_difference" else exact
        self.eps = EPS[precision]
        self.floor = self.eps * (1 if "16" in precision else ROUNDINGS)
        # one error that torch makes may be small by luck, in 16 bits more so
        self.luck = 40 if "16" in precision else 4
        self.selector_eps = DOUBLE_EPS if precision == "float64" else SINGLE_EPS
        self.step_eps = self.eps if precision == "bfloat16" else self.selector_eps
        optimizer = truth.world.optimizer
        if optimizer["kind"] == "NAdam" or optimizer["lr_tensor"]:
            self.dots_share += 8 * SINGLE
            self.share += SINGLE
            self.step_eps += SINGLE

    @property
    def dots_are_noise(self) -> bool:
        """Whether rounding may be half of the largest dot: then nothing says if dots are right."""
        truth = self.truth
        return truth.learns and self.dots_allowed >= NOISE_SHARE * largest_entry(truth.dots)

    def faults(self, call: Call) -> list[Fault]:
        """Everything that is wrong."""
        faults = [*self._results(call), *self._state(call)]
        return [f for f in faults if not (f.allowed == math.inf or f.error <= LEEWAY * f.allowed)]

    def _results(self, call: Call) -> Iterator[Fault]:
        truth, plain, result = self.truth, self.plain, call.result
        if getattr(result, "skipped", False):
            yield from self._skipped(call)
            return
        yield self._vector(
            "losses", result.losses, truth.losses, [o.losses for o in self.others], self.share
        )
        if truth.learns:
            yield self._vector(
                "val_loss",
                result.val_loss,
                truth.val_loss,
                [o.val_loss for o in self.others],
                self.share,
                self._val_loss_noise(),
            )
            yield Fault("dots", distance(result.dots, truth.dots), self.dots_allowed)
        elif result.dots is not None:
            yield Fault("dots of a call without a selector step", 1.0, 0.0)
        z, w, p = truth.final_weights(double(call.objects.selector))
        z_plain, w_plain, p_plain = plain.final_weights(call.objects.selector)
        rounding = 0.0 if truth.reuses else self._z_noise(call.objects.selector, z)
        more = self.share + rounding
        yield self._vector("logits", result.logits, z, [z_plain], self.share, more)
        yield self._vector(
            "weights", result.weights, w, [w_plain], self.share, rounding * largest_entry(w)
        )
        yield self._vector("p", result.normalized_weights, p, [p_plain], self.share, 2 * rounding)
        # judged by now: what follows from p is judged by the p that was given
        p = result.normalized_weights.double()
        loss = (p * truth.losses).sum()
        loss_plain = (p * plain.losses).sum()
        floor = self.share * truth.losses.abs().max().item()
        yield self._vector("loss", result.loss, loss, [loss_plain], self.share, floor)
        yield from self._selector(call)
        yield from self._classifier(call, p)

    def _skipped(self, call: Call) -> Iterator[Fault]:
        """A step whose gradient overflowed under loss scaling: no parameter has moved."""
        float16 = self.truth.world.precision == "autocast float16"
        yield Fault("a skipped step", 0.0 if float16 else 1.0, 0.0)
        losses = [other.losses for other in self.others]
        yield self._vector("losses", call.result.losses, self.truth.losses, losses, self.share)
        current = dict(call.objects.model.named_parameters())
        for name, parameter in self.plain.model.named_parameters():
            yield Fault(f"skipped parameter {name}", distance(current[name], parameter), 0.0)

    def _vector(
        self,
        name: str,
        value: Tensor,
        true: Tensor,
        others: Sequence[Tensor],
        share: float,
        more: float = 0.0,
    ) -> Fault:
        torch_error = max(distance(other, true) for other in others)
        allowed = share * largest_entry(true) + TORCH_ERRORS * torch_error + more
        return Fault(name, distance(value, true), allowed + self.floor * 1e-3)

    def _z_noise(self, selector: nn.Module, z: Tensor) -> float:
        """What a few roundings of the penultimate features do to z, once standardised."""
        truth = self.truth
        selector = double(selector)
        noise = FEATURE_ROUNDINGS * self.eps
        rounded = [
            truth.weigh(selector, truth.noisy_features(truth.train, noise, k), truth.train)[0]
            for k in (0, 1)
        ]
        return 4 * max(distance(z_rounded, z) for z_rounded in rounded)

    @cached_property
    def dots_allowed(self) -> float:
        """Of d_i."""
        truth = self.truth
        near = truth.summed(truth.near, truth.v, size=True).max().item()
        terms = truth.summed(truth.kappa, truth.v, size=True).max().item()
        torch_error = TORCH_ERRORS * max(distance(other.dots, truth.dots) for other in self.others)
        if (
            torch_error >= NOISE_SHARE * TORCH_ERRORS * largest_entry(truth.dots)
            and "16" in truth.world.precision
        ):
            return math.inf
        share = self.dots_share * largest_entry(truth.dots)
        noise = self._dots_noise() + self._kappa_noise()
        return share + torch_error + near + self.floor * terms + noise

    def _noise_of(self, g: Gradients, sizes: Gradients, others: Sequence[Gradients]) -> Gradients:
        """How far each gradient entry may be off."""
        largest = max((x.abs().max().item() for x in sizes if x is not None), default=0.0)
        bounds: Gradients = []
        for k, x in enumerate(g):
            if x is None:
                bounds.append(None)
                continue
            near = [other[k] for other in others]
            torch_error = TORCH_ERRORS * max(distance(y, x) for y in near if y is not None)
            share = self.share * largest_entry(sizes[k])
            bound = share + torch_error + self.floor * largest
            bounds.append(torch.full_like(x, bound))
        return bounds

    @cached_property
    def _ahead_noise(self) -> Gradients:
        """How far theta' may be off for rounding of g alone."""
        truth = self.truth
        sizes = truth.combined(truth.p, size=True)
        bounds = self._noise_of(truth.g, sizes, [o.g for o in self.others])
        moved: Gradients = []
        for i, (theta, g, bound) in enumerate(zip(truth.theta, truth.g, bounds, strict=True)):
            if g is None:
                moved.append(None)
                continue
            at = truth._updated(i, theta, g)[0]
            away = [(truth._updated(i, theta, g + s * bound)[0] - at).abs() for s in CORNERS]
            moved.append(torch.stack(away).amax(0) + self.step_eps * theta.abs())
        return moved

    def _val_loss_noise(self) -> float:
        pairs = zip(self.truth.v, self._ahead_noise, strict=True)
        first = sum((v.abs() * m).sum().item() for v, m in pairs if v is not None and m is not None)
        return float(first)

    def _dots_noise(self) -> float:
        """What theta' within its noise does to the dots, by two corners of it."""
        truth = self.truth
        moved = self._ahead_noise
        g = torch.Generator().manual_seed(0)
        worst = 0.0
        for _ in range(2):
            theta = [
                t if m is None else t + m * (torch.randint(2, m.shape, generator=g) * 2 - 1)
                for t, m in zip(truth.ahead, moved, strict=True)
            ]
            with_v = truth.validation(theta)[1]
            worst = max(worst, distance(truth.dots_along(with_v), truth.dots))
        return 2 * worst

    def _kappa_noise(self) -> float:
        """What gradients of noise, where the true ones are nearly 0, do to kappa of Adam and such.

        kappa grows as 1 / g^2 there, and such a gradient may be any value within its bounds.
        """
        truth = self.truth
        if truth.world.optimizer["kind"] == "SGD":
            return 0.0
        bounds = self._noise_of(
            truth.g, truth.combined(truth.p, size=True), [o.g for o in self.others]
        )
        noisy = [
            None if g is None else torch.where(g.abs() < b, torch.full_like(g, TAIL) * b, g)
            for g, b in zip(truth.g, bounds, strict=True)
        ]
        worst = truth.kappa_at(noisy)
        parts: Gradients = []
        for g, b, k in zip(truth.g, bounds, worst, strict=True):
            parts.append(None if g is None else k * (g.abs() < b))
        total = truth.summed(parts, truth.v, size=True).max().item()
        # noise has per-sample gradients of its own, where the true ones are 0
        for k, v, b in zip(parts, truth.v, bounds, strict=True):
            if k is not None and v is not None:
                total += (k * v * b).abs().sum().item()
        return total

    def _selector(self, call: Call) -> Iterator[Fault]:
        truth, before = self.truth, self.truth.objects
        selector = list(call.objects.selector.parameters())
        old = list(before.selector.parameters())
        if not truth.learns:
            worst = max(distance(a, b) for a, b in zip(selector, old, strict=True))
            yield Fault("selector in a call without a step of it", worst, 0.0)
            return
        slack = truth.p_pupil * torch.sigmoid(-truth.z_pupil) * 2 * self.dots_allowed
        slack = (slack + truth.cotangent.abs() * self.share * 10) * (self.luck / 4)
        place = {id(p): k for k, p in enumerate(old)}
        kind = self.truth.world.selector["optimizer"]["kind"]
        optimizer = call.objects.selector_optimizer
        new_of = {id(a): b for a, b in zip(old, selector, strict=True)}
        sizes = [weighted(truth.cotangent.abs(), Z.abs()) for Z in truth.Z if Z is not None]
        largest = max(size.max().item() for size in sizes)
        noise = FEATURE_ROUNDINGS * self.eps
        noisy = [
            truth.selector_gradients(truth.noisy_features(truth.pupil, noise, seed))[1]
            for seed in (range(4) if "16" in truth.world.precision else range(1))
        ]
        for group in before.selector_optimizer.param_groups:
            for parameter in group["params"]:
                Z = truth.Z[place[id(parameter)]]
                if Z is None:
                    continue
                g = weighted(truth.cotangent, Z)
                k = place[id(parameter)]
                away = torch.stack([(rows[k] - Z).abs() for rows in noisy]).amax(0)
                off = away + (self.plain.Z[k] - Z).abs()
                bound = weighted(slack, Z.abs()) + self.luck * weighted(truth.cotangent.abs(), off)
                torch_error = (self.plain.phi_gradient[k] - truth.phi_gradient[k]).abs()
                bound = bound + TORCH_ERRORS * torch_error + self.selector_eps * ROUNDINGS * largest
                state = before.selector_optimizer.state.get(parameter, {})
                step = _Step(parameter.detach(), g, bound, group, state, kind)
                new = new_of[id(parameter)]
                yield from step.faults("selector", new, optimizer.state[new], self.selector_eps)

    def _classifier(self, call: Call, p: Tensor) -> Iterator[Fault]:
        truth = self.truth
        gradient = truth.combined(p)
        others = [o.combined(p) for o in self.others]
        if "16" in truth.world.precision and (together := self.plain.together(p)):
            others.append(together)
        bounds = self._noise_of(gradient, truth.combined(p, size=True), others)
        clip = truth.world.step["max_grad_norm"]
        if clip is not None:
            norm = sum(g.square().sum() for g in gradient if g is not None) ** 0.5
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            gradient = [None if g is None else g * factor for g in gradient]
        kind = truth.world.optimizer["kind"]
        current = dict(call.objects.model.named_parameters())
        names = {id(q): n for n, q in truth.model.named_parameters()}
        trained = set()
        for k, (parameter, group, state) in enumerate(truth.rows):
            if gradient[k] is None:
                continue
            new = current[names[id(parameter)]]
            trained.add(names[id(parameter)])
            step = _Step(truth.theta[k], gradient[k], bounds[k], group, state, kind)
            state = call.objects.optimizer.state.get(new, {})
            yield from step.faults("classifier", new, state, self.step_eps)
        for name, parameter in self.plain.model.named_parameters():
            if name not in trained:
                error = distance(current[name], parameter)
                yield Fault(f"untrained parameter {name}", error, 4 * self.step_eps)

    def _state(self, call: Call) -> Iterator[Fault]:
        """Buffers, generators and modes: those of one plain forward."""
        plain, objects = self.plain, call.objects
        for ours, theirs in ((objects.model, plain.model), (objects.loss, plain.loss)):
            if not isinstance(ours, nn.Module):
                continue
            buffers = dict(ours.named_buffers())
            for name, true in theirs.named_buffers():
                buffer = buffers[name]
                rounding = 0.0
                if true.is_floating_point():
                    rounding = (self.share / 10) * (1e-3 + largest_entry(true))
                yield Fault(f"buffer {name}", distance(buffer, true), rounding)
            modes = [m.training for m in ours.modules()]
            same = modes == [m.training for m in theirs.modules()]
            yield Fault("modes", 0.0 if same else 1.0, 0.0)
        moved = call.generators.moved_since(plain.after_forward)
        yield Fault(f"generators ({', '.join(moved)})", float(len(moved)), 0.0)


@dataclass(frozen=True)
class _Step:
    """One tensor's true optimizer step, its gradient known to within `bound`."""

    theta: Tensor
    g: Tensor
    bound: Tensor
    group: dict
    state: dict
    kind: str

    def faults(self, who: str, new: Tensor, new_state: dict, eps: float) -> Iterator[Fault]:
        """Of the parameter and of the optimizer's state."""
        group = {**self.group, "lr": float(self.group["lr"])}
        # plain torch itself is not finite there
        unknown = ~self.bound.isfinite()
        bound = self.bound.masked_fill(unknown, 0.0)
        # a bound far beyond the gradient passes over what is between
        near = torch.minimum(bound, NEAR * self.g.abs())
        offsets = [torch.zeros_like(bound), *(s * bound for s in CORNERS)]
        offsets += [s * near for s in NEAR_CORNERS]
        runs = [updated(self.theta, self.g + x, group, self.state, self.kind) for x in offsets]
        true, state, _ = runs[0]
        start: Tensor | float = self.theta.abs().max()
        truths = [(f"{who} parameter", new, true, [r[0] for r in runs[1:]], start)]
        for name, value in state.items():
            if name not in new_state or new_state[name] is None:
                yield Fault(f"{who} optimizer's {name} is missing", 1.0, 0.0)
                continue
            others = [r[1][name] for r in runs[1:]]
            start = self.state.get(name, 0.0)
            truths.append((f"{who} optimizer's {name}", new_state[name], value, others, start))
        for name, ours, value, others, start in truths:
            value = torch.as_tensor(value, dtype=torch.float64)
            spread = [(torch.as_tensor(o, dtype=torch.float64) - value).abs() for o in others]
            # of the terms, which may cancel
            size = value.abs() + torch.as_tensor(start, dtype=torch.float64).abs()
            allowed = torch.stack(spread).amax(0) * BETWEEN_CORNERS + 8 * eps * size
            allowed = allowed.expand(unknown.shape) if allowed.ndim == 0 else allowed
            if allowed.shape == unknown.shape:
                allowed = allowed.masked_fill(unknown, float("inf"))
            excess = (ours.detach().double() - value).abs() - allowed
            k = int(excess.nan_to_num(float("inf")).argmax())
            error = (ours.detach().double() - value).abs().flatten()[k].item()
            yield Fault(name, error, allowed.expand(excess.shape).flatten()[k].item())
