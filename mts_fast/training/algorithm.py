"""One MTS step, rows 1 to 9 in their order; what is written is undone by the caller on error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from mts_fast import ops
from mts_fast._check import check_finite, fail
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng
from mts_fast.diagnostics import selector_gsnr
from mts_fast.hypergradient import Engine, EngineChoice, Linearization, Objective, Refused
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.guard import bound, invariant_gap, is_rounding, random_signs
from mts_fast.training.batch import CheckedBatch, CheckedValidation
from mts_fast.training.gradient_scaling import GradientScaling
from mts_fast.training.result import StepResult
from mts_fast.training.selector_inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.selector_trainer import Scorer, SelectorTrainer, SelectorUpdate
from mts_fast.training.validation import validation_gradient

OP = "MTSStep"
ONLINE_HINT = "inputs, val_inputs, or the model in eval mode, are broken; or pass other features"


@dataclass(frozen=True)
class Call:
    """What one call of the step is given and does."""

    batch: CheckedBatch
    selector_batch: CheckedBatch | None  # the selector's own batch, where it has one
    validation: CheckedValidation
    updates_selector: bool
    weighted: bool  # False during warm-up
    schedule: str
    check_values: bool  # look at values, which on a GPU waits for them

    @property
    def reuses_gradient(self) -> bool:
        """Whether the classifier takes the virtual step's own gradient."""
        return self.updates_selector and self.schedule == "reuse" and self.weighted

    @property
    def updates_on_own_batch(self) -> bool:
        """Whether the selector learns from the training batch."""
        return self.updates_selector and self.selector_batch is None


@dataclass
class Looked:
    """Rows 1 to 6: all that the selector's update needs, before anything is written."""

    linearization: Linearization
    features: Tensor  # h [B, F]
    z: Tensor  # [B]
    p: Tensor  # [B]
    before_scoring: RngState  # generators before the selector drew its masks
    gradient: list[Tensor | None] | None = None  # row 3, unscaled
    update: SelectorUpdate | None = None
    val_loss: Tensor | None = None
    gap: Tensor | None = None
    guarded: bool = False  # the gap was looked at
    masked: Tensor | None = None
    engine: str = ""
    overflow: bool = False  # a gradient that loss scaling has pushed beyond float16


@dataclass
class Outcome:
    """The gradient of row 9, and what to report."""

    gradient: list[Tensor | None]
    result: StepResult


@dataclass
class Algorithm:
    """The parts that rows 1 to 9 are made of."""

    objective: Objective
    validation: Objective  # the model with the loss of the validation samples
    optimizer: torch.optim.Optimizer
    engines: EngineChoice
    features: OnlineFeatures | OfflineFeatures
    scorer: Scorer
    trainer: SelectorTrainer
    _: KW_ONLY
    validation_mode: str
    val_objective: str
    hypergradient_lr: float | None
    micro_batch: int | None
    track_gsnr: bool

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Those that gradients and directions are aligned with."""
        return self.engines.parameters

    def look(self, call: Call, layout: str, scaling: GradientScaling) -> Looked:
        """Rows 1 to 6.

        Raises:
            Refused: the engine cannot serve this batch, or its dots fail the guard.
        """
        world = self.objective.world
        engine = self.engines.engine_for(layout)
        probing = call.updates_selector and self.engines.is_probing(layout)
        # differences are checked with random signs, too, which takes a gradient more
        signed = probing and engine.name == FiniteDifference.name
        own = call.updates_on_own_batch
        start = RngState.capture(world)
        self.features.observe_validation(
            call.validation.inputs, call.selector_batch if call.updates_selector else None
        )
        # the only forward that leaves a trace in the model's buffers and generators
        with self.features.beside_forward(call.batch) as forward:
            linearization = engine.linearize(
                call.batch,
                gradients=1
                + (call.updates_selector and not call.reuses_gradient)
                + (signed and own),
                dots=own,
            )
            forward.ran(linearization)
        h = forward.features(update=own)
        if call.check_values and not torch.isfinite(h.sum()):
            _check_losses(linearization)
            check_finite(OP, "the selector's input", h, ONLINE_HINT)
        looked = self._score(call, h, linearization)
        looked.engine = engine.name
        if not call.updates_selector:
            return looked
        # row 3
        scaled = linearization.gradient(scaling.scaled(looked.p))
        looked.gradient = scaling.unscaled(scaled)
        if call.check_values and not scaling.active:
            _check_losses(linearization)
        looked.overflow = scaling.overflowed(looked.gradient)
        if looked.overflow:
            return looked
        after_forward = RngState.capture(world)
        after_scoring = after_forward
        # what the selector's batch writes stays until its graph is done with
        beside = nullcontext() if call.selector_batch is None else preserved_buffers(world)
        with preserved_rng(world), beside:
            # rows 4, 5
            virtual = ops.virtual_update(self.optimizer, looked.gradient)
            looked.val_loss, v = validation_gradient(
                self.validation,
                self.parameters,
                virtual.parameters,
                call.validation,
                train_mode=self.validation_mode == "train",
                objective_name=self.val_objective,
                micro_batch=self.micro_batch,
                scaling=scaling,
            )
            if call.check_values:
                self._check_look_ahead(call, looked, virtual.parameters)
            looked.overflow = scaling.overflowed(v)
            if looked.overflow:
                return looked
            # row 6
            direction = virtual.scale(v, self.hypergradient_lr)
            looked.masked = direction.masked_entries
            if call.selector_batch is None:
                dots = linearization.dots(direction).to(looked.z.dtype)
                looked.update = SelectorUpdate(call.batch, h, looked.z, looked.p, dots)
                compared = looked.gradient
                looked.gap = invariant_gap(looked.p, dots, compared, direction)
                checked = linearization
            else:
                checked, h_own = self._own_batch(call, engine, start, probing + signed)
                # the selector's masks follow those of the training forward
                after_forward.restore()
                z, p = self.trainer.forward(call.selector_batch, h_own, updates=True)
                after_scoring = RngState.capture(world)
                with preserved_buffers(world):
                    compared = checked.gradient(p) if probing else []
                    dots = checked.dots(direction).to(z.dtype)
                looked.update = SelectorUpdate(call.selector_batch, h_own, z, p, dots)
                if probing:
                    looked.gap = invariant_gap(p, dots, compared, direction)
            if signed:
                p = looked.update.p * random_signs(looked.update.p, self.engines.calls(layout))
                with preserved_buffers(world):
                    by_signs = checked.gradient(p)
        after_scoring.restore()
        if call.check_values:
            hint = "lower the learning rate, or look for overflow in the model"
            check_finite(OP, "the hypergradient dot of every sample", looked.update.dots, hint)
        if probing:
            self._guard(looked, looked.update.p, compared, direction)
            looked.guarded = True
        if signed:
            self._guard(looked, p, by_signs, direction)
        self.engines.served(layout)
        return looked

    def finish(self, call: Call, looked: Looked, scaling: GradientScaling) -> Outcome:
        """Rows 7 to 9, but for the classifier's optimizer."""
        gsnr = None
        z, p = looked.z, looked.p
        gradient = looked.gradient
        if looked.update is not None:
            # rows 7, 8
            if self.track_gsnr:
                arguments = self.scorer.arguments(looked.update.batch, looked.update.features)
                gsnr = selector_gsnr(self.scorer.selector, arguments, looked.update.cotangent())
            self.trainer.step(looked.update)
            if not call.reuses_gradient:
                # row 9: weights again with the new phi, under the masks of the first time
                with (
                    preserved_rng(self.scorer.world, looked.before_scoring),
                    preserved_buffers(self.scorer.world),
                ):
                    z, p = self.trainer.forward(call.batch, looked.features, updates=False)
                if call.check_values:
                    hint = "its own step made it diverge: lower the learning rate of the selector"
                    check_finite(OP, "selector's output after its step", z, hint)
        if not call.weighted:
            p = self.scorer.unweighted(call.batch, z)
        if call.check_values:
            _check_weights(p, self.scorer.class_weight)
        if looked.overflow:
            pass  # the gradient of row 3 holds the overflow that makes the scaler skip this step
        elif not call.reuses_gradient:
            gradient = looked.linearization.gradient(scaling.scaled(p))
            if not scaling.active and call.check_values:
                _check_losses(looked.linearization)
                self._check_gradient(gradient, looked.linearization.losses.dtype)
        else:
            assert gradient is not None
            gradient = scaling.scaled_again(gradient)
        assert gradient is not None
        z = z.detach()
        losses = looked.linearization.losses
        result = StepResult(
            losses=losses,
            loss=(p * losses).sum(),
            logits=z,
            weights=self.scorer.weights(call.batch, z),
            normalized_weights=p,
            val_loss=looked.val_loss,
            dots=None if looked.update is None else looked.update.dots,
            self_check=looked.gap,
            gsnr=gsnr,
            engine=looked.engine,
            masked_entries=looked.masked,
        )
        return Outcome(gradient, result)

    def _score(self, call: Call, h: Tensor, linearization: Linearization) -> Looked:
        """Rows 1 and 2. Of the selector's forwards in a call one leaves a trace in its buffers and
        in the generators: that of the batch which it learns from."""
        before = RngState.capture(self.scorer.world)
        own = call.updates_on_own_batch
        if own or not call.updates_selector:
            z, p = self.trainer.forward(call.batch, h, updates=own)
        else:
            with preserved_rng(self.scorer.world), preserved_buffers(self.scorer.world):
                z, p = self.trainer.forward(call.batch, h, updates=False)
        if call.check_values:
            hint = "the selector has diverged or its features are extreme: lower its learning rate"
            check_finite(OP, "selector's output", z.detach(), hint)
            _check_weights(p, self.scorer.class_weight)
        return Looked(linearization, h, z, p, before)

    def _own_batch(
        self, call: Call, engine: Engine, start: RngState, gradients: int
    ) -> tuple[Linearization, Tensor]:
        """The selector's batch run forward, with the masks of the training forward, and its
        features h [B2, F]; `gradients` are for the guard."""
        batch, world = call.selector_batch, self.objective.world
        assert batch is not None
        with preserved_rng(world, start):
            with self.features.beside_forward(batch) as forward:
                linearization = engine.linearize(batch, gradients=gradients)
                linearization.begin()
                forward.ran(linearization)
            h = forward.features(update=True)
        if call.check_values:
            check_finite(OP, "the selector's input", h, ONLINE_HINT)
        return linearization, h

    def _guard(
        self,
        looked: Looked,
        p: Tensor,
        gradient: list[Tensor | None],
        direction: Sequence[Tensor],
    ) -> None:
        """Refuse dots that miss the invariant for these weights. Waits for the device."""
        assert looked.update is not None
        dots = looked.update.dots
        allowed = bound(looked.engine, self.parameters)
        gap = float(invariant_gap(p, dots, gradient, direction))
        if gap <= allowed or is_rounding(p, dots, gradient, direction):
            return
        raise Refused(
            looked.engine,
            [
                f"sum p d differs from <kappa v, grad L> by {gap:.1e} of sum p |d|"
                f" (allowed {allowed:.0e})"
            ],
        )

    def _check_look_ahead(self, call: Call, looked: Looked, theta: list[Tensor]) -> None:
        """Name the first link of rows 3 to 5 that is not finite."""
        assert looked.val_loss is not None and looked.gradient is not None
        if torch.isfinite(looked.val_loss):
            return
        self._check_gradient(looked.gradient, looked.linearization.losses.dtype)
        for i, tensor in enumerate(theta):
            hint = "look at the optimizer's learning rate, eps and state"
            name = f"the virtual parameter {self._name(i)}"
            check_finite(OP, name, tensor, hint)
        hint = "the validation batch, or the model in its mode for it, is broken"
        check_finite(OP, "the validation loss", looked.val_loss, hint)

    def _check_gradient(self, gradient: list[Tensor | None], dtype: torch.dtype) -> None:
        """The first gradient that is not finite is named. Waits."""
        present = [(i, g) for i, g in enumerate(gradient) if g is not None]
        sums = [g.sum().to(dtype) for _, g in present]
        if torch.isfinite(torch.stack(sums).sum()):
            return
        for i, g in present:
            if not torch.isfinite(g).all():
                got = f"NaN or infinity in that of {self._name(i)}"
                hint = "losses are finite: look for a derivative that is not (a norm or root at 0)"
                expected = "finite"
                fail(ValueError, OP, "the gradient of the training batch", expected, got, hint)

    def _name(self, i: int) -> str:
        """The dotted path of a parameter."""
        parameter = self.parameters[i]
        for root in self.objective.world.roots:
            for name, candidate in root.named_parameters():
                if candidate is parameter:
                    return repr(name)
        return f"number {i} of the optimizer"


def _check_losses(linearization: Linearization) -> None:
    hint = "the training inputs or the model are broken"
    check_finite(OP, "the loss of every training sample", linearization.losses, hint)


def _check_weights(p: Tensor, class_weight: Tensor | None) -> None:
    if class_weight is None:
        hint = "the selector's output is extreme: lower its learning rate"
    else:
        hint = "look at class_weight and at the selector's output"
    check_finite(OP, "the normalised weight of every sample", p, hint)
