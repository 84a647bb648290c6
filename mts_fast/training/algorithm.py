"""One MTS step: rows 1 to 9 in order. On an error the caller undoes what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from mts_fast._check import check_finite
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng
from mts_fast.diagnostics import SamplingStatistics, selector_gsnr
from mts_fast.distributed import Ranks, Sums
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
from mts_fast.training.batch_run import (
    BatchRunner,
    Plan,
    Run,
    check_losses,
    check_weights,
)
from mts_fast.training.call import Call, Outcome, Prepared
from mts_fast.training.finite import FiniteChecks
from mts_fast.training.gradient_scaling import GradientScaling, representable
from mts_fast.training.result import StepResult
from mts_fast.training.sampled.batch_statistics import batch_norms
from mts_fast.training.sampled.compute import ComputeChoice
from mts_fast.training.sampled.part import Sampled, whole_gradient
from mts_fast.training.selector_inputs import OfflineFeatures
from mts_fast.training.selector_trainer import SelectorUpdate
from mts_fast.training.validation import VirtualClassifier
from mts_fast.training.virtual_step import VirtualStep

OP = "MTSStep"


@dataclass
class Algorithm:
    """Rows 1 to 9, and the objects that they work with."""

    ranks: Ranks
    objective: Objective
    validation: Objective  # the model with the loss of the validation samples
    optimizer: torch.optim.Optimizer
    engines: EngineChoice
    runner: BatchRunner
    _: KW_ONLY
    validation_mode: str
    val_objective: str
    hypergradient_lr: float | None
    virtual_norm: float | None  # the largest norm of the virtual step's gradient
    micro_batch: int | None
    track_gsnr: bool
    compute: ComputeChoice

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trainable parameters, in the order of gradients and directions."""
        return self.engines.parameters

    @property
    def _finite(self) -> FiniteChecks:
        return FiniteChecks(self.objective, self.parameters)

    def prepare(self, call: Call, layout: str, scaling: GradientScaling) -> Prepared:
        """Rows 1 to 6.

        Raises:
            Refused: the engine cannot serve this batch, or its dots fail the guard.
        """
        world = self.objective.world
        engine = self.engines.engine_for(layout)
        probing = call.probing
        # finite differences are also checked with random signs, which takes one more gradient
        signed = probing and engine.name == FiniteDifference.name
        on_training_batch = call.updates_on_training_batch
        start = RngState.capture(world)
        # before a forward moves running statistics; otherwise stage 1 gives features, too
        observes = call.computed is None or bool(batch_norms(world))
        self._observe_validation(call, call.updates_selector and observes)
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
        linearization, part = run.linearization, run.part
        reports_loss = call.reuses_gradient or scaling.active  # row 9 may bring none

        def row_3() -> Sums:
            weights = part.shard.mine(part.weights(run.p))
            gradient = scaling.unscaled(linearization.gradient(scaling.scaled(weights)))
            if call.check_values and not scaling.active:
                check_losses(linearization)
            loss = [self._loss(call, run, run.p)] if reports_loss else []
            return gradient + part.rest(run.p), loss

        like = [*self.parameters, *(self.parameters[i] for i in part.completed)]
        sums, numbers = self.ranks.summed("row 3", like, int(reports_loss), row_3)
        prepared.loss = numbers[0] if reports_loss else None
        computed, rest = sums[: len(self.parameters)], sums[len(self.parameters) :]
        prepared.gradient = whole_gradient(computed, part, rest)
        prepared.overflow = scaling.overflowed(prepared.gradient)
        if prepared.overflow:
            return prepared
        after_forward = RngState.capture(world)
        after_scoring = after_forward
        # buffers that the selector's batch changes are restored after its last backward
        buffers = nullcontext() if call.selector_batch is None else preserved_buffers(world)
        with preserved_rng(world), buffers:
            # rows 4, 5
            virtual = VirtualStep.take(
                self.optimizer,
                prepared.gradient,
                sharding=self.objective.sharding,
                max_norm=self.virtual_norm,
            )
            classifier = VirtualClassifier(
                self.validation,
                self.parameters,
                virtual.parameters,
                self.validation_mode == "train",
                self.micro_batch,
            )
            name = self.val_objective
            q = classifier.shares(self.ranks, call.validation, name)

            def row_5() -> Sums:
                gradient, loss = classifier.gradient(call.validation, name, q, scaling)
                if call.check_values:
                    self._finite.check_validation(loss, prepared.gradient, virtual.parameters)
                return gradient, [loss]

            v, (prepared.val_loss,) = self.ranks.summed("row 5", self.parameters, 1, row_5)
            prepared.overflow = scaling.overflowed(v)
            if prepared.overflow:
                return prepared
            # row 6
            direction = virtual.direction(v, self.hypergradient_lr)
            prepared.masked = self._total(direction.masked_entries)
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
                    computed=call.computed and min(call.computed, batch.shard.total),
                    updates=True,
                    scores_apart=False,
                    weighted=True,
                    forward_from=start,
                    scoring_from=after_forward,
                )
                learned = self.runner.run(batch, plan)
                after_scoring = learned.after_scoring
            prepared.learned = learned.part
            shard, weights = learned.part.shard, learned.part.weights(learned.p)
            # J^T p of the samples that were run, to compare the dots with
            compared = computed if learned is run else []
            with preserved_buffers(world) if learned is not run else nullcontext():
                if learned is not run and probing:
                    compared = self._gradient(learned, shard.mine(weights))
                dots, losses = self._dots(call, learned, direction, bool(compared))
            if compared:
                prepared.gap = invariant_gap(weights, dots, compared, direction, self._total)
                prepared.allowed = self._allowed(engine.name, weights, losses)
            if signed:
                signs = random_signs(weights, call.number)
                with preserved_buffers(world):
                    by_signs = self._gradient(learned, shard.mine(weights * signs))
        after_scoring.restore()
        if probing:
            self._guard(prepared, weights, dots, compared, direction)
            prepared.guarded = True
        if signed:
            self._guard(prepared, weights * signs, dots, by_signs, direction)
        spread = learned.part.spread(dots, direction, learned.p, learned.z)
        prepared.update = SelectorUpdate(
            learned.rows, learned.features, learned.z, learned.p, spread
        )
        prepared.shard = batch.shard
        self.engines.served(layout)
        return prepared

    def _total(self, number: Tensor) -> Tensor:
        """A sum over entries of parameters, of all shards."""
        sharding = self.objective.sharding
        return number if sharding is None else sharding.total(number)

    def _observe_validation(self, call: Call, with_selector_batch: bool) -> None:
        """Features of the validation batch, where the selector has features that refer to it."""
        features = self.runner.features
        if isinstance(features, OfflineFeatures):
            return
        selector_batch = call.selector_batch if with_selector_batch else None

        def of_validation() -> list[Tensor]:
            computed = features.of_validation(call.validation, selector_batch)
            if call.check_values and self.ranks.size > 1:  # the others could not tell whose it is
                hint = "val_inputs, or the model in eval mode, are broken"
                check_finite(OP, "the penultimate features of val_inputs", computed, hint)
            return [computed]

        name, shard = "features of the validation batch", call.validation.shard
        (features.validation,) = self.ranks.rows(name, shard, of_validation)

    def _gradient(self, run: Run, weights: Tensor) -> list[Tensor | None]:
        """sum p grad l over the samples of all ranks, for the weights of those here."""
        compute = run.linearization.gradient
        sums = self.ranks.summed("check", self.parameters, 0, lambda: (compute(weights), []))
        return sums[0]

    def _dots(
        self,
        call: Call,
        run: Run,
        direction: Sequence[Tensor],
        with_losses: bool,
    ) -> tuple[Tensor, Tensor]:
        """Row 6 for the samples that all ranks have run, and their losses (else dots again, since
        reading losses may cost a forward)."""

        def rows() -> list[Tensor]:
            along, size = representable(direction, self.parameters)
            dots = run.linearization.dots(along).to(run.z.dtype)
            if size is not None:
                dots = dots * size
            if call.check_values:
                hint = "lower the learning rate, or look for overflow in the model"
                check_finite(OP, "the hypergradient dot of every sample", dots, hint)
            return [dots, run.linearization.losses] if with_losses else [dots]

        name = "dots and losses" if with_losses else "dots"
        dots, *losses = self.ranks.rows(name, run.part.shard, rows)
        return dots, losses[0] if losses else dots

    def _loss(self, call: Call, run: Run, p: Tensor) -> Tensor:
        """sum p l [] over the samples here."""
        return (call.batch.shard.mine(p) * run.losses).sum()

    def finish(
        self,
        call: Call,
        prepared: Prepared,
        scaling: GradientScaling,
        check: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Rows 7 to 9, without the step of the classifier's optimizer; `check` may still refuse."""
        run, part = prepared.run, prepared.run.part
        gsnr, z, p = None, run.z, run.p
        gradient = prepared.gradient

        def learn() -> None:
            nonlocal gsnr, z, p
            check()
            gsnr, z, p = self._learned(call, prepared)

        loss = prepared.loss
        if prepared.overflow:
            # in the gradient of row 3: the scaler skips this step
            self.ranks.together(learn)
        elif not call.reuses_gradient:

            def row_9() -> Sums:
                learn()
                scaled = scaling.scaled(p)
                gradient = run.linearization.gradient(part.shard.mine(part.weights(scaled)))
                gradient = whole_gradient(gradient, part, part.rest(scaled))
                if not scaling.active and call.check_values:
                    check_losses(run.linearization)
                    self._finite.check_gradient(gradient)
                return gradient, [self._loss(call, run, p)]

            gradient, (loss,) = self.ranks.summed("row 9", self.parameters, 1, row_9)
        else:
            assert gradient is not None
            self.ranks.together(learn)
            gradient = scaling.scaled_again(gradient)
        assert gradient is not None and loss is not None
        z = z.detach()
        mine = call.batch.shard.mine
        w = self.runner.scorer.weights(run.rows, z)
        update = prepared.update
        result = StepResult(
            losses=run.losses,
            loss=loss,
            logits=mine(z),
            weights=mine(w),
            normalized_weights=mine(p),
            val_loss=prepared.val_loss,
            dots=None if update is None else prepared.shard.mine(update.dots),
            self_check=prepared.gap,
            gsnr=gsnr,
            engine=prepared.engine,
            masked_entries=prepared.masked,
            sampling=self._note_draw(prepared, p),
            of_all_ranks=None if self.ranks.size == 1 else (w, p),
        )
        return Outcome(gradient, result)

    def _learned(self, call: Call, prepared: Prepared) -> tuple[Tensor | None, Tensor, Tensor]:
        """Rows 7 and 8, then the weights of the classifier's step: (GSNR, z, p)."""
        gsnr, run = None, prepared.run
        z, p = run.z, run.p
        if prepared.update is not None:
            # rows 7, 8
            if self.track_gsnr:
                arguments = self.runner.scorer.arguments(
                    prepared.update.rows, prepared.update.features
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
                    z, p = self.runner.trainer.forward(run.rows, run.features, updates=False)
                if call.check_values:
                    hint = "its own step made it diverge: lower the learning rate of the selector"
                    check_finite(OP, "selector's output after its step", z, hint)
        if not call.weighted:
            p = self.runner.scorer.unweighted(run.rows, z)
        if call.check_values:
            check_weights(p, self.runner.scorer.class_weight)
        return gsnr, z, p

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
        gap = float(invariant_gap(p, dots, gradient, direction, self._total))
        allowed = float(prepared.allowed)
        if gap <= allowed or is_rounding(p, dots, gradient, direction, self._total):
            return
        raise Refused(
            prepared.engine,
            [
                f"sum p d differs from <kappa v, grad L> by {gap:.1e} of sum p |d|"
                f" (allowed {allowed:.0e})"
            ],
        )
