"""One MTS step: rows 1 to 9 in order. On an error the caller undoes what was written."""

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
    """Inputs of one call of the step, and what the call does."""

    batch: CheckedBatch
    selector_batch: CheckedBatch | None  # the selector's own batch, where it has one
    validation: CheckedValidation
    updates_selector: bool
    weighted: bool  # False during warm-up
    schedule: str
    check_values: bool  # read values to check them, which waits for a GPU

    @property
    def reuses_gradient(self) -> bool:
        """Whether the classifier's step uses the gradient of row 3 again."""
        return self.updates_selector and self.schedule == "reuse" and self.weighted

    @property
    def updates_on_training_batch(self) -> bool:
        """Whether the selector learns from the training batch."""
        return self.updates_selector and self.selector_batch is None


@dataclass
class Prepared:
    """Results of rows 1 to 6: what the selector's update needs, before anything is written."""

    linearization: Linearization
    features: Tensor  # h [B, F]
    z: Tensor  # [B]
    p: Tensor  # [B]
    before_scoring: RngState  # generators before the selector drew its masks
    gradient: list[Tensor | None] | None = None  # row 3, unscaled
    update: SelectorUpdate | None = None
    val_loss: Tensor | None = None
    gap: Tensor | None = None  # [], of the sum rule; see `invariant_gap`
    guarded: bool = False  # the guard has checked the dots
    masked: Tensor | None = None  # [], entries of kappa set to 0
    engine: str = ""
    overflow: bool = False  # loss scaling has pushed a gradient beyond float16


@dataclass
class Outcome:
    """The gradient of row 9, and what to report."""

    gradient: list[Tensor | None]
    result: StepResult


@dataclass
class Algorithm:
    """Rows 1 to 9, and the objects that they work with."""

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
        """The trainable parameters, in the order of gradients and directions."""
        return self.engines.parameters

    def prepare(self, call: Call, layout: str, scaling: GradientScaling) -> Prepared:
        """Rows 1 to 6.

        Raises:
            Refused: the engine cannot serve this batch, or its dots fail the guard.
        """
        world = self.objective.world
        engine = self.engines.engine_for(layout)
        probing = call.updates_selector and self.engines.is_probing(layout)
        # finite differences are also checked with random signs, which takes one more gradient
        signed = probing and engine.name == FiniteDifference.name
        on_training_batch = call.updates_on_training_batch
        start = RngState.capture(world)
        self.features.observe_validation(
            call.validation.inputs, call.selector_batch if call.updates_selector else None
        )
        # the only forward whose changes to the model's buffers and generators remain
        with self.features.beside_forward(call.batch) as forward:
            linearization = engine.linearize(
                call.batch,
                gradients=1
                + (call.updates_selector and not call.reuses_gradient)
                + (signed and on_training_batch),
                dots=on_training_batch,
            )
            forward.ran(linearization)
        h = forward.features(update=on_training_batch)
        if call.check_values and not torch.isfinite(h.sum()):
            _check_losses(linearization)
            check_finite(OP, "the selector's input", h, ONLINE_HINT)
        prepared = self._score(call, h, linearization)
        prepared.engine = engine.name
        if not call.updates_selector:
            return prepared
        # row 3
        scaled = linearization.gradient(scaling.scaled(prepared.p))
        prepared.gradient = scaling.unscaled(scaled)
        if call.check_values and not scaling.active:
            _check_losses(linearization)
        prepared.overflow = scaling.overflowed(prepared.gradient)
        if prepared.overflow:
            return prepared
        after_forward = RngState.capture(world)
        after_scoring = after_forward
        # buffers that the selector's batch changes are restored after its last backward
        buffers = nullcontext() if call.selector_batch is None else preserved_buffers(world)
        with preserved_rng(world), buffers:
            # rows 4, 5
            virtual = ops.virtual_update(self.optimizer, prepared.gradient)
            prepared.val_loss, v = validation_gradient(
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
                self._check_validation_loss(call, prepared, virtual.parameters)
            prepared.overflow = scaling.overflowed(v)
            if prepared.overflow:
                return prepared
            # row 6
            direction = virtual.scale(v, self.hypergradient_lr)
            prepared.masked = direction.masked_entries
            if call.selector_batch is None:
                dots = linearization.dots(direction).to(prepared.z.dtype)
                prepared.update = SelectorUpdate(call.batch, h, prepared.z, prepared.p, dots)
                compared = prepared.gradient
                prepared.gap = invariant_gap(prepared.p, dots, compared, direction)
                checked = linearization
            else:
                checked, selector_h = self._run_selector_batch(
                    call, engine, start, probing + signed
                )
                # the selector's dropout masks are drawn after those of the training forward
                after_forward.restore()
                z, p = self.trainer.forward(call.selector_batch, selector_h, updates=True)
                after_scoring = RngState.capture(world)
                with preserved_buffers(world):
                    compared = checked.gradient(p) if probing else []
                    dots = checked.dots(direction).to(z.dtype)
                prepared.update = SelectorUpdate(call.selector_batch, selector_h, z, p, dots)
                if probing:
                    prepared.gap = invariant_gap(p, dots, compared, direction)
            if signed:
                p = prepared.update.p * random_signs(prepared.update.p, self.engines.calls(layout))
                with preserved_buffers(world):
                    by_signs = checked.gradient(p)
        after_scoring.restore()
        if call.check_values:
            hint = "lower the learning rate, or look for overflow in the model"
            check_finite(OP, "the hypergradient dot of every sample", prepared.update.dots, hint)
        if probing:
            self._guard(prepared, prepared.update.p, compared, direction)
            prepared.guarded = True
        if signed:
            self._guard(prepared, p, by_signs, direction)
        self.engines.served(layout)
        return prepared

    def finish(self, call: Call, prepared: Prepared, scaling: GradientScaling) -> Outcome:
        """Rows 7 to 9, without the step of the classifier's optimizer."""
        gsnr = None
        z, p = prepared.z, prepared.p
        gradient = prepared.gradient
        if prepared.update is not None:
            # rows 7, 8
            if self.track_gsnr:
                arguments = self.scorer.arguments(prepared.update.batch, prepared.update.features)
                gsnr = selector_gsnr(self.scorer.selector, arguments, prepared.update.cotangent())
            self.trainer.step(prepared.update)
            if not call.reuses_gradient:
                # row 9: weights again with the new phi, under the dropout masks of row 1
                with (
                    preserved_rng(self.scorer.world, prepared.before_scoring),
                    preserved_buffers(self.scorer.world),
                ):
                    z, p = self.trainer.forward(call.batch, prepared.features, updates=False)
                if call.check_values:
                    hint = "its own step made it diverge: lower the learning rate of the selector"
                    check_finite(OP, "selector's output after its step", z, hint)
        if not call.weighted:
            p = self.scorer.unweighted(call.batch, z)
        if call.check_values:
            _check_weights(p, self.scorer.class_weight)
        if prepared.overflow:
            pass  # the overflow in the gradient of row 3 makes the scaler skip this step
        elif not call.reuses_gradient:
            gradient = prepared.linearization.gradient(scaling.scaled(p))
            if not scaling.active and call.check_values:
                _check_losses(prepared.linearization)
                self._check_gradient(gradient, prepared.linearization.losses.dtype)
        else:
            assert gradient is not None
            gradient = scaling.scaled_again(gradient)
        assert gradient is not None
        z = z.detach()
        losses = prepared.linearization.losses
        result = StepResult(
            losses=losses,
            loss=(p * losses).sum(),
            logits=z,
            weights=self.scorer.weights(call.batch, z),
            normalized_weights=p,
            val_loss=prepared.val_loss,
            dots=None if prepared.update is None else prepared.update.dots,
            self_check=prepared.gap,
            gsnr=gsnr,
            engine=prepared.engine,
            masked_entries=prepared.masked,
        )
        return Outcome(gradient, result)

    def _score(self, call: Call, h: Tensor, linearization: Linearization) -> Prepared:
        """Rows 1 and 2. Of the selector's forwards in a call, only the one on the batch that it
        learns from changes its buffers and the generators."""
        before = RngState.capture(self.scorer.world)
        on_training_batch = call.updates_on_training_batch
        if on_training_batch or not call.updates_selector:
            z, p = self.trainer.forward(call.batch, h, updates=on_training_batch)
        else:
            with preserved_rng(self.scorer.world), preserved_buffers(self.scorer.world):
                z, p = self.trainer.forward(call.batch, h, updates=False)
        if call.check_values:
            hint = "the selector has diverged or its features are extreme: lower its learning rate"
            check_finite(OP, "selector's output", z.detach(), hint)
            _check_weights(p, self.scorer.class_weight)
        return Prepared(linearization, h, z, p, before)

    def _run_selector_batch(
        self, call: Call, engine: Engine, start: RngState, gradients: int
    ) -> tuple[Linearization, Tensor]:
        """The forward of the selector's batch, under the masks of the training forward, and its
        features h [B2, F]; `gradients` says how many the guard takes of it."""
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
        prepared: Prepared,
        p: Tensor,
        gradient: list[Tensor | None],
        direction: Sequence[Tensor],
    ) -> None:
        """Refuse dots that miss the invariant for these weights. Waits for the device."""
        assert prepared.update is not None
        dots = prepared.update.dots
        allowed = bound(prepared.engine, self.parameters)
        gap = float(invariant_gap(p, dots, gradient, direction))
        if gap <= allowed or is_rounding(p, dots, gradient, direction):
            return
        raise Refused(
            prepared.engine,
            [
                f"sum p d differs from <kappa v, grad L> by {gap:.1e} of sum p |d|"
                f" (allowed {allowed:.0e})"
            ],
        )

    def _check_validation_loss(self, call: Call, prepared: Prepared, theta: list[Tensor]) -> None:
        """Raise for the first quantity of rows 3 to 5 that is not finite."""
        assert prepared.val_loss is not None and prepared.gradient is not None
        if torch.isfinite(prepared.val_loss):
            return
        self._check_gradient(prepared.gradient, prepared.linearization.losses.dtype)
        for i, tensor in enumerate(theta):
            hint = "look at the optimizer's learning rate, eps and state"
            name = f"the virtual parameter {self._name(i)}"
            check_finite(OP, name, tensor, hint)
        hint = "the validation batch, or the model in its mode for it, is broken"
        check_finite(OP, "the validation loss", prepared.val_loss, hint)

    def _check_gradient(self, gradient: list[Tensor | None], dtype: torch.dtype) -> None:
        """Raise for the first gradient that is not finite. Waits for the device."""
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
