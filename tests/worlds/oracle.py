"""One MTS step in plain torch, written without mts_fast: the truth that worlds are judged by.

Every sample's gradient is one backward of its own loss, so nothing is linearised, replayed or
differentiated twice; kappa is autograd's derivative of update_rules.py. The same code in the
world's own dtype says how exact torch itself is there.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from worlds.builders import Batch
from worlds.generators import Generators, drawing_from, preserved_buffers
from worlds.in_double import Gradients, Snapshot, cross_entropy, in_double, per_sample, score
from worlds.layers import Checkpointed
from worlds.models import PRECISIONS
from worlds.tolerances import NEAR_BOUND, NOISE_BOUND, VARIANCE_EPSILON
from worlds.update_rules import updated


class Truth:
    """Rows 1 to 7 of a call, and rows 8 and 9 for whoever asks."""

    def __init__(
        self,
        before: Snapshot,
        train: Batch,
        val: Batch,
        meta: Batch | None,
        *,
        double: bool,
        rounded: tuple[float, int] | None = None,
    ) -> None:
        """`double` in float64, on copies; else in the world's dtype, which uses the snapshot up.

        `rounded` (eps, seed): parameters off by a random rounding, to see what that does.
        """
        self.world, self.start, self.steps = before.world, before.generators, before.steps
        objects = in_double(before.objects) if double else before.objects
        self.objects, self.double = objects, double
        self.model, self.optimizer, self.loss = objects.model, objects.optimizer, objects.loss
        for module in self.model.modules():
            if isinstance(module, Checkpointed):
                module.enabled = False
        if rounded is not None:
            eps, seed = rounded
            g = torch.Generator().manual_seed(seed)
            for parameter in self.model.parameters():
                noise = 2 * torch.rand(parameter.shape, generator=g, dtype=torch.float64) - 1
                parameter.data.mul_(1 + eps * noise)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.running = {n: v.double() for n, v in before.running.items()}
        if double:
            train, val = train.double(), val.double()
            meta = None if meta is None else meta.double()
        self.train, self.val = train, val
        o = self.world.step
        self.learns = self.steps % o["selector_every"] == 0
        self.warm = self.steps < o["warmup_steps"]
        self.reuses = self.learns and o["schedule"] == "reuse" and not self.warm
        self.meta = meta if self.learns else None
        self.rows = [
            (p, group, self.optimizer.state.get(p, {}))
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        with drawing_from(self.start), self._autocast():
            self._compute()

    def _compute(self) -> None:
        pupil = self.train if self.meta is None else self.meta
        self.h = self._features(self.train, self.learns and self.meta is None)
        self.h_pupil = self.h if self.meta is None else self._features(self.meta, True)
        self.z, self.p = self.weigh(self.objects.selector, self.h, self.train)
        # rows 3 and 9
        self.losses, self.G, self._graphs = self._linearized(self.train, self.model, self.loss)
        self.after_forward = Generators.now()
        # a forward may write into parameters, too (max_norm)
        self.theta = [p.detach().clone() for p, *_ in self.rows]
        if not self.learns:
            return
        self.g = self.combined(self.p)
        self.ahead = [
            t if g is None else self._updated(i, t, g)[0]
            for i, (t, g) in enumerate(zip(self.theta, self.g, strict=True))
        ]
        self.val_loss, self.v = self.validation(self.ahead)  # row 5
        self.z_pupil, self.p_pupil, self.G_pupil = self.z, self.p, self.G
        if self.meta is not None:
            # the masks of the training forward, buffers as it left them
            with drawing_from(self.start):
                _, self.G_pupil, _ = self._linearized(self.meta, *self._copies())
            self.z_pupil, self.p_pupil = self.weigh(self.objects.selector, self.h_pupil, self.meta)
        self.kappa, self.near = self._kappa()
        self.dots = self.dots_along(self.v)  # row 6
        self.pupil = pupil
        z, self.Z = self.selector_gradients(self.h_pupil)
        # row 7: d val_loss/d z by autograd, and every logit's own gradient by phi
        leaf = z.detach().requires_grad_()
        surrogate = -(self.dots * self._p(leaf, pupil)).sum()
        self.cotangent = grad(surrogate, leaf)[0]
        self.phi_gradient = self._phi_gradient()

    def selector_gradients(self, h: Tensor) -> tuple[Tensor, Gradients]:
        """z [B] of the selector's batch and the gradient of each by phi."""
        selector = self.objects.selector
        z = score(selector, h, self.pupil.selector_classes, self.pupil.is_synthetic)
        return z, per_sample(z, list(selector.parameters()))

    def _phi_gradient(self) -> list[Tensor]:
        """d val_loss/d phi in one backward, as training would take it."""
        selector, pupil = self.objects.selector, self.pupil
        z = score(selector, self.h_pupil, pupil.selector_classes, pupil.is_synthetic)
        phi = list(selector.parameters())
        return list(
            grad(z, phi, self.cotangent.to(z.dtype), allow_unused=True, materialize_grads=True)
        )

    def _autocast(self) -> Any:
        if self.double or not self.world.precision.startswith("autocast"):
            return contextlib.nullcontext()
        dtype = getattr(torch, self.world.precision.split()[1])
        return torch.autocast("cpu", dtype)

    def losses_of(self, model: nn.Module, loss: Any, inputs: Any, labels: Tensor) -> Tensor:
        """[B]."""
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        return (loss or cross_entropy)(output, labels)

    def chunks(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        """Fresh copies of the micro-batches."""
        size = self.world.step["micro_batch"] or len(batch)
        return [batch.rows(slice(i, i + size)) for i in range(0, len(batch), size)]

    def _copies(self) -> tuple[nn.Module, Any]:
        """Of model and loss as they are, to be run without a trace."""
        return copy.deepcopy((self.model, self.loss))

    @cached_property
    def _spare(self) -> tuple[nn.Module, Any]:
        """Copies that other parameters are tried in."""
        return self._copies()

    def _linearized(
        self, batch: Batch, model: nn.Module, loss: Any
    ) -> tuple[Tensor, Gradients, list[Tensor]]:
        """Losses [B] of one forward, every sample's gradient, and the losses with their graphs."""
        parameters = self._parameters(model)
        graphs, parts = [], []
        for chunk in self.chunks(batch):
            value = self.losses_of(model, loss, *chunk)
            parts.append((len(value), per_sample(value, parameters)))
            graphs.append(value)
        joined: Gradients = []
        for k, p in enumerate(parameters):
            pieces = [part[k] for _, part in parts]
            if all(piece is None for piece in pieces):
                joined.append(None)
                continue
            rows = [
                p.new_zeros(n, *p.shape) if x is None else x
                for (n, _), x in zip(parts, pieces, strict=True)
            ]
            joined.append(torch.cat(rows))
        return torch.cat([x.detach() for x in graphs]), joined, graphs

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        """Those that the optimizer trains, of the model or a copy of it."""
        names = {id(p): n for n, p in self.model.named_parameters()}
        named = dict(model.named_parameters())
        return [named[names[id(p)]] for p, *_ in self.rows]

    def combined(self, p: Tensor, size: bool = False) -> Gradients:
        """sum_i p_i grad l_i; with `size` the sum of absolute values."""
        return [
            None
            if G is None
            else torch.tensordot(p.to(G.dtype), G.abs() if size else G, dims=([0], [0]))
            for G in self.G
        ]

    def together(self, p: Tensor) -> Gradients | None:
        """The same as training takes it: by one backward, which rounds otherwise in 16 bits.

        None where forwards have written to parameters since, which the graph has saved."""
        if "max_norm" in self.world.head["embedding"]:
            return None
        parameters = self._parameters(self.model)
        total: Gradients = [None] * len(parameters)
        for losses, share in zip(
            self._graphs, p.split([len(x) for x in self._graphs]), strict=True
        ):
            if not losses.requires_grad:
                continue
            weights = share.to(losses.dtype)
            gradients = grad(losses, parameters, weights, retain_graph=True, allow_unused=True)
            for k, g in enumerate(gradients):
                if g is not None:
                    before = total[k]
                    g = g.to_dense().double()
                    total[k] = g if before is None else before + g
        return total

    def _updated(self, i: int, theta: Tensor, g: Tensor, lr: float | None = None) -> Any:
        _, group, state = self.rows[i]
        group = {**group, "lr": float(group["lr"]) if lr is None else lr}
        return updated(theta, g.to(theta.dtype), group, state, self.world.optimizer["kind"])

    def kappa_at(self, gradients: Gradients) -> Gradients:
        """-d theta'/d g at other gradients."""
        slopes: Gradients = []
        for i, (theta, g) in enumerate(zip(self.theta, gradients, strict=True)):
            if g is None:
                slopes.append(None)
                continue
            leaf = g.detach().requires_grad_()
            ahead = self._updated(i, theta, leaf, self.world.step["hypergradient_lr"])[0]
            slopes.append(-grad(ahead.sum(), leaf)[0])
        return slopes

    def _kappa(self) -> tuple[Gradients, Gradients]:
        """-d theta'/d g, and the same where rounding decides whether it is 0."""
        largest = max(g.abs().max().item() for g in self.g if g is not None)
        dtype = PRECISIONS.get(self.world.precision, torch.float32)
        # gradients of 16 bits are summed up in float32
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        kappa: Gradients = []
        near: Gradients = []
        for i, (theta, g) in enumerate(zip(self.theta, self.g, strict=True)):
            if g is None:
                kappa.append(None)
                near.append(None)
                continue
            leaf = g.detach().requires_grad_()
            theta_ahead, _, root = self._updated(
                i, theta, leaf, self.world.step["hypergradient_lr"]
            )
            slope = -grad(theta_ahead.sum(), leaf)[0]
            edge = torch.zeros_like(slope)
            if root is not None:
                bound = NOISE_BOUND * eps * largest
                unsure = (root > bound / NEAR_BOUND) & (root < bound * NEAR_BOUND)
                edge = slope.abs() * unsure
                slope = slope * (root >= bound) * (root > 0)
            kappa.append(slope)
            near.append(edge)
        return kappa, near

    def dots_along(self, v: Sequence[Tensor | None]) -> Tensor:
        """d_i = <kappa v, grad l_i> [B]."""
        return self.summed(self.kappa, v, size=False)

    def summed(
        self, kappa: Sequence[Tensor | None], v: Sequence[Tensor | None], *, size: bool
    ) -> Tensor:
        """sum_k kappa_k v_k G_ik [B]; with `size` of absolute values."""
        dtype = torch.promote_types(self.losses.dtype, torch.float32)
        total = torch.zeros(len(self.z_pupil), dtype=dtype)
        for k, v_k, G in zip(kappa, v, self.G_pupil, strict=True):
            if k is None or v_k is None or G is None:
                continue
            terms = (k * v_k).to(total.dtype) * G.to(total.dtype)
            total = total + (terms.abs() if size else terms).flatten(1).sum(1)
        return total

    def validation(self, theta: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        """Mean validation loss at theta and its gradient, on buffers as the forward left them."""
        model, loss = self._spare
        parameters = self._parameters(model)
        for parameter, value in zip(parameters, theta, strict=True):
            parameter.data.copy_(value)
        mode = self.world.step["validation_mode"] == "train"
        for module in (model, loss):
            if isinstance(module, nn.Module):
                module.train(mode)
        total = torch.zeros(())
        v: Gradients = [None] * len(parameters)
        with drawing_from(self.after_forward), preserved_buffers(model, loss):
            for chunk in self.chunks(self.val):
                part = self.losses_of(model, loss, *chunk).sum() / len(self.val)
                total = total + part.detach()
                for k, new in enumerate(grad(part, parameters, allow_unused=True)):
                    old, new = v[k], None if new is None else new.to_dense()
                    v[k] = old if new is None else new if old is None else old + new
        return total, v

    def _features(self, batch: Batch, update: bool) -> Tensor:
        """h [B, F]: the online features before the caller's."""
        o = self.world.step
        x = val = None
        if o["online_features"]:
            x, val = self._penultimate(batch), self._penultimate(self.val)
            self._seen[id(batch)] = x, val
        return self._composed(batch, x, val, update)

    def noisy_features(self, batch: Batch, eps: float, seed: int) -> Tensor:
        """h [B, F] of a batch, penultimate features and their cosines off by a random rounding."""
        if not self.world.step["online_features"]:
            return self.h if batch is self.train else self.h_pupil
        g = torch.Generator().manual_seed(seed)

        def rounded(t: Tensor) -> Tensor:
            return t * (1 + eps * (2 * torch.rand(t.shape, generator=g, dtype=torch.float64) - 1))

        x, val = (rounded(t) for t in self._seen[id(batch)])
        return self._composed(batch, x, val, False, rounded)

    def _composed(
        self,
        batch: Batch,
        x: Tensor | None,
        val: Tensor | None,
        update: bool,
        rounded: Callable[[Tensor], Tensor] = lambda t: t,
    ) -> Tensor:
        o = self.world.step
        parts = []
        if x is not None and val is not None:
            unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
            others = val / val.norm(dim=1, keepdim=True).clamp(min=1e-12)
            centre = val.mean(0) / val.mean(0).norm().clamp(min=1e-12)
            nearest = (unit @ others.T).sort(1, descending=True).values[:, : o["online_k"]]
            for name, cosines in (("nearest", nearest), ("centroid", (unit @ centre)[:, None])):
                values = rounded(cosines)
                statistics = torch.stack([values.mean(), values.var(correction=0)]).double()
                m = o["online_momentum"]
                if m is not None:
                    old = self.running.get(name, statistics)
                    if update:
                        self.running[name] = m * old + (1 - m) * statistics
                    statistics = self.running.get(name, statistics)
                mean, variance = statistics
                parts.append((values - mean) / (variance + VARIANCE_EPSILON).sqrt())
        if batch.features is not None:
            parts.append(batch.features)
        if not parts:
            return torch.zeros(len(batch), 0)
        dtype = torch.float64 if self.double else parts[-1].dtype
        return torch.cat([x.to(dtype) for x in parts], 1)

    @cached_property
    def _eval_model(self) -> nn.Module:
        """A copy in eval mode of the model as the call found it."""
        return copy.deepcopy(self.model).eval()

    def _penultimate(self, batch: Batch) -> Tensor:
        """What goes into the head [B, D], in eval mode."""
        model = self._eval_model
        seen: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad(), drawing_from(self.start):
            for inputs, labels in self.chunks(batch):
                self.losses_of(model, lambda output, labels: output, inputs, labels)
        hook.remove()
        x = torch.cat(seen)
        return x if x.ndim == 2 else x.mean(1)

    def _p(self, z: Tensor, batch: Batch) -> Tensor:
        log_w = F.logsigmoid(z)
        if self.world.step["class_weight"] is not None:
            log_w = log_w + self._class_weight(batch).to(z.dtype).log()
        return log_w.softmax(0)

    def _class_weight(self, batch: Batch) -> Tensor:
        weight = self.world.step["class_weight"]
        table = torch.tensor(weight or [1.0], dtype=torch.float64)
        return table[batch.selector_classes] if weight else torch.ones(len(batch))

    @torch.no_grad()
    def weigh(self, selector: nn.Module, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(z [B], p [B]) of rows 1 and 2."""
        z = score(selector, h, batch.selector_classes, batch.is_synthetic)
        return z, self._p(z, batch)

    def final_weights(self, selector: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(z, w, p) of row 9, by the selector as it is after the call."""
        with self._autocast():
            z, p = (self.z, self.p) if self.reuses else self.weigh(selector, self.h, self.train)
        w = torch.sigmoid(z) * self._class_weight(self.train)
        if self.warm:
            with self._autocast():
                p = self._p(torch.full_like(z, 0.0), self.train)
        return z, w, p
