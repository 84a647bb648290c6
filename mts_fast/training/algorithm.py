"""One MTS step: rows 1 to 9 in order. On an error the caller undoes what was written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from mts_fast import ops
from mts_fast._check import check_finite, fail
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng
from mts_fast.diagnostics import SamplingStatistics, selector_gsnr
from mts_fast.hypergradient import EngineChoice, Objective, Refused
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.hypergradient.guard import (
    bound,
    invariant_gap,
    is_rounding,
    random_signs,
    saturation,
    unit_roundoff,
)
from mts_fast.training.batch import CheckedBatch, CheckedValidation
from mts_fast.training.batch_run import (
    BatchRunner,
    Plan,
    Run,
    check_losses,
    check_weights,
)
from mts_fast.training.gradient_scaling import GradientScaling
from mts_fast.training.result import StepResult
from mts_fast.training.sampled.batch_statistics import batch_norms
from mts_fast.training.sampled.compute import ComputeChoice, Costs
from mts_fast.training.sampled.part import Part, Sampled
from mts_fast.training.selector_trainer import SelectorUpdate
from mts_fast.training.validation import validation_gradient

OP = "MTSStep"


@dataclass(frozen=True)
class Call:
    """Inputs of one call of the step, and what the call does."""

    batch: CheckedBatch
    selector_batch: CheckedBatch | None  # the selector's own batch, where it has one
    validation: CheckedValidation
    updates_selector: bool
    weighted: bool  # False during warm-up
    schedule: str
    computed: int | None  # how many samples of a batch are run; None: all, in one stage
    costs: Costs
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

    run: Run
    gradient: list[Tensor | None] | None = None  # row 3, unscaled
    update: SelectorUpdate | None = None
    learned: Part | None = None  # of the batch that the selector learns from
    val_loss: Tensor | None = None
    gap: Tensor | None = None  # [], of the sum rule; see `invariant_gap`
    allowed: Tensor | None = None  # [], the largest gap of right dots
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
    runner: BatchRunner
    _: KW_ONLY
    validation_mode: str
    val_objective: str
    hypergradient_lr: float | None
    micro_batch: int | None
    track_gsnr: bool
    compute: ComputeChoice

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
        # before a forward moves running statistics; otherwise stage 1 gives features, too
        observes = call.computed is None or bool(batch_norms(world))
        self.runner.features.observe_validation(
            call.validation.inputs,
            call.selector_batch if call.updates_selector and observes else None,
        )
        # the only forward whose changes to the model's buffers and generators remain
        plan = Plan(
            engine,
            gradients=1
            + (call.updates_selector and not call.reuses_gradient)
            + (signed and on_training_batch),
            dots=on_training_batch,
            computed=call.computed,
            updates=on_training_batch,
            scores_apart=call.updates_selector and not on_training_batch,
            weighted=call.weighted,
            probes=probing,
            check_values=call.check_values,
        )
        run = self.runner.run(call.batch, plan)
        prepared = Prepared(run, engine=engine.name)
        if not call.updates_selector:
            return prepared
        # row 3
        linearization = run.linearization
        scaled = linearization.gradient(scaling.scaled(run.part.weights(run.p)))
        computed = scaling.unscaled(scaled)
        prepared.gradient = run.part.completed(computed, run.p)
        if call.check_values and not scaling.active:
            check_losses(linearization)
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
            learned, batch = run, call.batch
            if call.selector_batch is not None:
                batch = call.selector_batch
                # under the masks of the training forward (of a draw: masks of the same stream); the
                # selector's are drawn after those
                plan = replace(
                    plan,
                    # differences about BatchNorm's statistics start from a forward in the middle
                    gradients=max(probing + signed, call.computed is not None),
                    dots=True,
                    computed=call.computed and min(call.computed, len(batch)),
                    updates=True,
                    scores_apart=False,
                    weighted=True,
                    forward_from=start,
                    scoring_from=after_forward,
                )
                learned = self.runner.run(batch, plan)
                after_scoring = learned.after_scoring
            prepared.learned = learned.part
            weights = learned.part.weights(learned.p)
            # J^T p of the samples that were run, to compare the dots with
            compared = computed if learned is run else []
            with preserved_buffers(world) if learned is not run else nullcontext():
                if learned is not run and probing:
                    compared = learned.linearization.gradient(weights)
                dots = learned.linearization.dots(direction).to(learned.z.dtype)
            if compared:
                prepared.gap = invariant_gap(weights, dots, compared, direction)
                losses = learned.linearization.losses
                prepared.allowed = self._allowed(engine.name, weights, losses)
            if signed:
                signs = random_signs(weights, self.engines.calls(layout))
                with preserved_buffers(world):
                    by_signs = learned.linearization.gradient(weights * signs)
        after_scoring.restore()
        if call.check_values:
            hint = "lower the learning rate, or look for overflow in the model"
            check_finite(OP, "the hypergradient dot of every sample", dots, hint)
        if probing:
            self._guard(prepared, weights, dots, compared, direction)
            prepared.guarded = True
        if signed:
            self._guard(prepared, weights * signs, dots, by_signs, direction)
        spread = learned.part.spread(dots, direction, learned.p, learned.z)
        prepared.update = SelectorUpdate(batch, learned.features, learned.z, learned.p, spread)
        self.engines.served(layout)
        return prepared

    def finish(self, call: Call, prepared: Prepared, scaling: GradientScaling) -> Outcome:
        """Rows 7 to 9, without the step of the classifier's optimizer."""
        gsnr = None
        run = prepared.run
        z, p = run.z, run.p
        gradient = prepared.gradient
        if prepared.update is not None:
            # rows 7, 8
            if self.track_gsnr:
                arguments = self.runner.scorer.arguments(
                    prepared.update.batch, prepared.update.features
                )
                gsnr = selector_gsnr(
                    self.runner.scorer.selector, arguments, prepared.update.cotangent()
                )
            self.runner.trainer.step(prepared.update)
            if not call.reuses_gradient:
                # row 9: weights again with the new phi, under the dropout masks of row 1
                with (
                    preserved_rng(self.runner.scorer.world, run.before_scoring),
                    preserved_buffers(self.runner.scorer.world),
                ):
                    z, p = self.runner.trainer.forward(call.batch, run.features, updates=False)
                if call.check_values:
                    hint = "its own step made it diverge: lower the learning rate of the selector"
                    check_finite(OP, "selector's output after its step", z, hint)
        if not call.weighted:
            p = self.runner.scorer.unweighted(call.batch, z)
        if call.check_values:
            check_weights(p, self.runner.scorer.class_weight)
        if prepared.overflow:
            pass  # the overflow in the gradient of row 3 makes the scaler skip this step
        elif not call.reuses_gradient:
            scaled = scaling.scaled(p)
            gradient = run.linearization.gradient(run.part.weights(scaled))
            gradient = run.part.completed(gradient, scaled)
            if not scaling.active and call.check_values:
                check_losses(run.linearization)
                self._check_gradient(gradient)
        else:
            assert gradient is not None
            gradient = scaling.scaled_again(gradient)
        assert gradient is not None
        z = z.detach()
        losses = run.losses
        result = StepResult(
            losses=losses,
            loss=(p * losses).sum(),
            logits=z,
            weights=self.runner.scorer.weights(call.batch, z),
            normalized_weights=p,
            val_loss=prepared.val_loss,
            dots=None if prepared.update is None else prepared.update.dots,
            self_check=prepared.gap,
            gsnr=gsnr,
            engine=prepared.engine,
            masked_entries=prepared.masked,
            sampling=self._note_draw(prepared, p),
        )
        return Outcome(gradient, result)

    def _allowed(self, engine: str, p: Tensor, losses: Tensor) -> Tensor:
        """The largest gap that right dots may have, []."""
        eps = unit_roundoff(self.parameters, losses)
        logarithmic = self.objective.is_logarithmic
        return bound(engine, self.parameters) + saturation(p, losses, eps, logarithmic=logarithmic)

    def _note_draw(self, prepared: Prepared, p: Tensor) -> SamplingStatistics | None:
        """What was drawn, for row 9's weights p; None where everything was computed."""
        part, learned = prepared.run.part, prepared.learned
        if not isinstance(part, Sampled):
            return None
        learned = learned if isinstance(learned, Sampled) else None
        self.compute.observe(part, learned, p)
        assert self.compute.outliers is not None
        return part.statistics(p, self.compute.outliers, learned)

    def _guard(
        self,
        prepared: Prepared,
        p: Tensor,
        dots: Tensor,
        gradient: list[Tensor | None],
        direction: Sequence[Tensor],
    ) -> None:
        """Refuse dots that miss the invariant for these weights. Waits for the device."""
        assert prepared.allowed is not None
        gap = float(invariant_gap(p, dots, gradient, direction))
        allowed = float(prepared.allowed)
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
        if math.isfinite(prepared.val_loss):
            return
        self._check_gradient(prepared.gradient)
        for i, tensor in enumerate(theta):
            hint = "look at the optimizer's learning rate, eps and state"
            name = f"the virtual parameter {self._name(i)}"
            check_finite(OP, name, tensor, hint)
        hint = "the validation batch, or the model in its mode for it, is broken"
        check_finite(OP, "the validation loss", prepared.val_loss, hint)

    def _check_gradient(self, gradient: list[Tensor | None]) -> None:
        """Raise for the first gradient that is not finite. Waits for the device."""
        present = [(i, g) for i, g in enumerate(gradient) if g is not None]
        # the norm may overflow where all are finite; then they are looked at one by one
        if math.isfinite(torch.nn.utils.get_total_norm([g for _, g in present])):
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
