"""Rows 1 and 2 and the training forward of a batch: in one stage, or in two where it is sampled.

Each rank runs its own samples; the selector scores those of all ranks, on each of them.

One stage: the forward of all samples, which gives the online features, too; then the weights. Two:
a forward of all candidates without a graph, the weights, a draw, and the forward of the drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mts_fast._check import check_finite, fail
from mts_fast._isolation import (
    Restoring,
    RngState,
    SavedBuffers,
    World,
    preserved_buffers,
    preserved_rng,
)
from mts_fast.distributed import Ranks
from mts_fast.hypergradient import Engine, LabelledBatch, Linearization, Objective
from mts_fast.training.batch import CheckedBatch, SelectorRows
from mts_fast.training.no_samples import NoSamples
from mts_fast.training.sampled.batch_statistics import batch_norms
from mts_fast.training.sampled.candidates import Candidates, Head, find_head, look
from mts_fast.training.sampled.checks import check_divisible, check_independent
from mts_fast.training.sampled.part import Drawn, Part, Sampled, Whole
from mts_fast.training.selector_inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.selector_trainer import Scorer, SelectorTrainer

OP = "MTSStep"
ONLINE_HINT = "inputs, val_inputs, or the model in eval mode, are broken; or pass other features"


@dataclass
class Run:
    """A batch as it was scored and run."""

    part: Part  # the samples that were run
    linearization: Linearization  # of these
    candidate_losses: Tensor | None  # [B] of stage 1, where there was one
    # of the samples of all ranks
    rows: SelectorRows
    features: Tensor  # h [B, F]
    z: Tensor  # [B]
    p: Tensor  # [B]
    before_scoring: RngState  # generators before the selector drew its masks
    after_scoring: RngState

    @property
    def losses(self) -> Tensor:
        """[B here]."""
        losses = self.candidate_losses
        return self.linearization.losses if losses is None else losses


@dataclass(frozen=True)
class Plan:
    """How a batch is to be run."""

    engine: Engine
    gradients: int  # how many will be asked for
    dots: bool  # whether dots will be
    computed: int | None  # how many samples are run; None: all, in one stage
    updates: bool  # the selector learns from this batch
    scores_apart: bool  # the selector's forward leaves its buffers and generators as they are
    weighted: bool  # False in warm-up
    probes: bool  # check what the results rest on
    check_values: bool
    # generators before the forward and before the selector draws its masks; None: as they are, and
    # then the forward moves them
    forward_from: RngState | None = None
    scoring_from: RngState | None = None


@dataclass(frozen=True)
class BatchRunner:
    """Runs the batches of one call."""

    ranks: Ranks
    objective: Objective
    features: OnlineFeatures | OfflineFeatures
    scorer: Scorer
    trainer: SelectorTrainer
    parameters: Sequence[Tensor]
    micro_batch: int | None
    candidate_dtype: torch.dtype | None  # of forwards over all candidates, by autocast

    def run(self, batch: CheckedBatch, plan: Plan) -> Run:
        """Score and run a batch."""
        if plan.computed is None:
            return self._in_one_stage(batch, plan)
        return self._in_two_stages(batch, plan, plan.computed)

    def _in_one_stage(self, batch: CheckedBatch, plan: Plan) -> Run:
        linearization: Linearization = NoSamples(plan.engine, batch)

        def forward() -> Tensor:
            nonlocal linearization
            with self._masks(plan):
                with self.features.beside_forward(batch) as forward:
                    linearization = self._linearize(batch, plan)
                    forward.ran(linearization)
                h = forward.columns()
            broken = plan.check_values and not math.isfinite(h.detach().sum())
            if broken and plan.forward_from is None:
                check_losses(linearization)
            return h

        rows, h, _ = self._joined(batch, plan, forward)
        before, z, p = self._score(rows, h, plan)
        return self._run(Whole(batch), linearization, None, rows, h, z, p, before)

    def _joined(
        self,
        batch: CheckedBatch,
        plan: Plan,
        columns: Callable[[], Tensor],
        beside: Callable[[], list[Tensor]] = list,
    ) -> tuple[SelectorRows, Tensor, list[Tensor]]:
        """What the selector reads of the samples of all ranks, and the tensors `beside` it; of
        `columns` and these for the samples here, which are not asked for where there are none."""

        def parts() -> list[Tensor]:
            h = columns() if len(batch) else batch.labels.new_empty(0, 0)
            if plan.check_values:
                check_finite(OP, "the selector's input", h, ONLINE_HINT)
            return [h, batch.classes, batch.is_synthetic, *beside()]

        name = "the selector's input" if plan.computed is None else "the candidates' input"
        h, classes, flags, *others = self.ranks.rows(name, batch.shard, parts)
        h = self.features.standardized(h, update=plan.updates)
        return SelectorRows(classes, flags), h, others

    def _in_two_stages(self, batch: CheckedBatch, plan: Plan, k: int) -> Run:
        before_forward = SavedBuffers(self._world)
        has_statistics = bool(batch_norms(self._world))
        head = find_head(self.objective, self.parameters)
        candidates = Candidates.none(batch)

        def columns() -> Tensor:
            nonlocal candidates
            candidates, features = self._look(batch, head, plan)
            return self.features.columns(batch, features)

        def norms() -> list[Tensor]:
            return [] if candidates.error_norms is None else [candidates.error_norms]

        rows, h, of_all = self._joined(batch, plan, columns, norms)
        before, z, p = self._score(rows, h, plan)
        drawn_by = p
        if not plan.weighted:  # row 9 weights by class alone
            drawn_by = (p + self.scorer.unweighted(rows, z)) / 2
        # under BatchNorm a sample belongs to the statistics of its rank
        drawn = Drawn(rows, drawn_by, of_all[0] if of_all else None, k, not has_statistics)
        part = Sampled(
            self.ranks, candidates, None if isinstance(head, str) else head, batch, drawn
        )
        after_scoring = RngState.capture(self._world)

        def second_stage() -> Linearization:
            # where stage 1 has moved the buffers, stage 2 begins as it did and leaves what it left
            once: AbstractContextManager[object] = nullcontext()
            if has_statistics:
                once = Restoring(SavedBuffers(self._world).restore, before_forward.restore)
            if not len(part.batch):
                return NoSamples(plan.engine, part.batch)
            with self._masks(plan), once:
                linearization = self._linearize(part.batch, plan)
                linearization.run()
            if plan.probes:
                check_independent(self.objective, part, linearization, before_forward)
            return linearization

        linearization = self.ranks.together(second_stage)
        run = self._run(part, linearization, candidates.losses, rows, h, z, p, before)
        if plan.forward_from is not None:
            run.after_scoring = after_scoring
        return run

    def _look(
        self, batch: CheckedBatch, head: Head | str, plan: Plan
    ) -> tuple[Candidates, Tensor | None]:
        """Stage 1, and penultimate features [B, D] in eval mode where the selector reads any."""
        has_statistics = bool(batch_norms(self._world))
        if self.objective.is_compiled and has_statistics:
            hint = "compile it without them, put them into eval mode, or leave compute= out"
            got = "BatchNorm in train mode under torch.compile"
            expected = "run by its modules, whose statistics a sampled step replaces"
            fail(RuntimeError, OP, "model", expected, got, hint)
        check_divisible(batch)
        # stage 1 gives the features of eval mode, unless it runs in train mode: then before it,
        # since it moves the running statistics
        features = None
        if has_statistics and self.features.watched is not None:
            with self._coarse(batch):
                features = self.features.penultimate(batch)
        # statistics of all candidates keep the precision of the call
        with nullcontext() if has_statistics else self._coarse(batch):
            candidates = look(
                self.objective,
                batch,
                head,
                self.features.watched,
                self.micro_batch,
                check_values=plan.check_values,
            )
        return candidates, candidates.penultimate if features is None else features

    def _coarse(self, batch: CheckedBatch) -> AbstractContextManager[object]:
        """Autocast to the candidates' dtype, where there is one."""
        if self.candidate_dtype is None:
            return nullcontext()
        return torch.autocast(batch.labels.device.type, self.candidate_dtype)

    @property
    def _world(self) -> World:
        return self.objective.world

    def _masks(self, plan: Plan) -> AbstractContextManager[object]:
        """Inside, a forward draws the masks that it shall have."""
        if plan.forward_from is None:
            return nullcontext()
        return preserved_rng(self._world, plan.forward_from)

    def _linearize(self, batch: LabelledBatch, plan: Plan) -> Linearization:
        linearization = plan.engine.linearize(batch, gradients=plan.gradients, dots=plan.dots)
        if plan.forward_from is not None:
            linearization.begin()
        return linearization

    def _run(
        self,
        part: Part,
        linearization: Linearization,
        losses: Tensor | None,
        rows: SelectorRows,
        h: Tensor,
        z: Tensor,
        p: Tensor,
        before: RngState,
    ) -> Run:
        after = RngState.capture(self._world)
        return Run(part, linearization, losses, rows, h, z, p, before, after)

    def _score(self, rows: SelectorRows, h: Tensor, plan: Plan) -> tuple[RngState, Tensor, Tensor]:
        """Generators before, z [B] and p [B]: rows 1 and 2. Of the selector's forwards in a call,
        only the one on the batch that it learns from changes its buffers and the generators."""
        if plan.scoring_from is not None:
            plan.scoring_from.restore()
        with ExitStack() as stack:
            if self.ranks.size > 1:  # every rank draws the selector's masks of all samples
                stack.enter_context(preserved_rng(self.scorer.world))
                self.ranks.seed()
            before = RngState.capture(self.scorer.world)
            if plan.scores_apart:
                stack.enter_context(preserved_rng(self.scorer.world))
                stack.enter_context(preserved_buffers(self.scorer.world))
            z, p = self.trainer.forward(rows, h, updates=plan.updates)
        if plan.check_values:
            hint = "the selector has diverged or its features are extreme: lower its learning rate"
            check_finite(OP, "selector's output", z.detach(), hint)
            check_weights(p, self.scorer.class_weight)
        return before, z, p


def check_losses(linearization: Linearization) -> None:
    """Raise for losses that are not finite."""
    hint = "the training inputs or the model are broken"
    check_finite(OP, "the loss of every training sample", linearization.losses, hint)


def check_weights(p: Tensor, class_weight: Tensor | None) -> None:
    """Raise for normalised weights that are not finite."""
    if class_weight is None:
        hint = "the selector's output is extreme: lower its learning rate"
    else:
        hint = "look at class_weight and at the selector's output"
    check_finite(OP, "the normalised weight of every sample", p, hint)
