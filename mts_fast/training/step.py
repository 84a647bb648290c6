"""MTSStep: one step of classifier and selector, in your own training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import check_choice, check_finite, check_positive_int, fail
from mts_fast._isolation import RngState, preserved_buffers, preserved_rng, restored_on_error
from mts_fast.diagnostics import selector_gsnr
from mts_fast.hypergradient import LabelledBatch, Linearization, Loss, Objective, make_engine
from mts_fast.ops.registry import BACKENDS
from mts_fast.ops.virtual_update import check_optimizer
from mts_fast.training.batch import CheckedBatch, SelectorBatch, check_batch, check_pair
from mts_fast.training.gradients import set_gradients
from mts_fast.training.inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.result import StepResult, invariant_gap
from mts_fast.training.scoring import EagerTeacher, Lesson, Scorer, Teacher
from mts_fast.training.selector_graph import SelectorGraph
from mts_fast.training.validation import validation_gradient

OP = "MTSStep"


class MTSStep:
    """Meta-learned selection of training data, one call per training batch.

    Each call weights the batch with the selector, looks one virtual optimizer step ahead, measures
    the validation loss there, moves the selector down its hypergradient, weights the batch again
    and takes the real optimizer step (rows 1 to 9). It takes the place of forward, backward,
    `optimizer.step()` and `zero_grad()` in your loop; mode, autocast and learning-rate schedules
    stay yours.

    Args:
        model: the classifier, any nn.Module; run in the mode that you left it in.
        optimizer: of the model: torch.optim.SGD, Adam or AdamW, any parameter groups.
        selector: `Selector`, or any module that returns a logit per sample [B] or [B, 1] from
            (features [B, F], classes [B], is_synthetic [B]).
        selector_optimizer: of the selector, any torch optimizer.
        engine: of row 6: "auto", "ghost", "finite_difference" or "forward_mode"; `explain_engine`.
        schedule: "exact" weights the classifier's step by the selector as updated in this call (row
            9), "reuse" as it was before (row 2), which saves a backward.
        memory: of the ghost engine: "fast", or "low", which makes output gradients once more
            instead of keeping them.
        micro_batch: run that many samples at a time; peak memory follows it. The result is that of
            the whole batch where samples are independent; BatchNorm in train mode sees each
            micro-batch, as under data parallelism.
        backend: "reference", "triton" or "cpp", for all ops inside; "auto" leaves the choice to
            `use_backend` and MTS_FAST_BACKEND around the call.
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits by default.
        class_weight: [C], factor of each class in the weights (row 1).
        hypergradient_lr: replaces the learning rate in kappa only (the paper's pseudo_lr).
        validation_mode: "eval" or "train", the model's mode for the validation loss.
        online_features: prepend k + 1 features: top-k cosines of the sample's penultimate features
            to the validation batch's, and the cosine to their mean, standardised.
        online_k: k.
        online_momentum: None standardises by the batch; in [0, 1), by running statistics.
        feature_layer: dotted path of the layer whose input holds the penultimate features; by
            default the last nn.Linear.
        selector_every: the selector learns in every k-th call.
        warmup_steps: in that many first calls the classifier is trained unweighted (every sample
            counts its class weight) while the selector already learns.
        selector_scheduler: a learning-rate scheduler of selector_optimizer, stepped in every call.
        max_grad_norm: clips the classifier's real gradient to this norm; the virtual step is not
            clipped.
        track_gsnr: estimate the GSNR of the selector's gradient in every selector step.
        cuda_graph: replay the selector's part of the step (rows 1, 2, 7 and 8), dozens of tiny
            launches, as CUDA graphs, recorded after a few calls of each batch size. Needs the
            selector on a GPU, without dropout and BatchNorm, and an optimizer made with
            capturable=True, or SGD (lr as a tensor, and SGD fused, where there is a scheduler).
        check: "auto" looks at values (finite, in range) where tensors are on the CPU; "always"
            also on a GPU, which waits for it; "never".

    Notes:
        A call leaves BatchNorm buffers and random generators bitwise as one plain weighted step
        would, and the classifier and its optimizer, too; with the ghost engine their gradient is
        that step's to rounding. When a call raises, nothing has changed.

    Source: DESIGN rows 1 to 9; Du, Zhao, Li, arXiv 2606.00571.

    Example:
        >>> import torch, mts_fast
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> selector = mts_fast.Selector(num_features=4, num_classes=3)
        >>> step = mts_fast.MTSStep(
        ...     model, torch.optim.SGD(model.parameters(), lr=0.1),
        ...     selector, torch.optim.AdamW(selector.parameters(), lr=1e-3))
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 3
        >>> result = step(x, y, val_inputs=x[:6], val_labels=y[:6])
        >>> round(result.normalized_weights.sum().item(), 5)
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        selector: nn.Module,
        selector_optimizer: torch.optim.Optimizer,
        *,
        engine: str = "auto",
        schedule: str = "exact",
        memory: str = "fast",
        micro_batch: int | None = None,
        backend: str = "auto",
        loss: Loss | None = None,
        class_weight: Tensor | None = None,
        hypergradient_lr: float | None = None,
        validation_mode: str = "eval",
        online_features: bool = True,
        online_k: int = 3,
        online_momentum: float | None = None,
        feature_layer: str | None = None,
        selector_every: int = 1,
        warmup_steps: int = 0,
        selector_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        max_grad_norm: float | None = None,
        track_gsnr: bool = False,
        cuda_graph: bool = False,
        check: str = "auto",
    ) -> None:
        check_choice(OP, "schedule", schedule, ("exact", "reuse"))
        check_choice(OP, "backend", backend, BACKENDS)
        check_choice(OP, "validation_mode", validation_mode, ("eval", "train"))
        check_choice(OP, "check", check, ("auto", "always", "never"))
        check_positive_int(OP, "selector_every", selector_every)
        check_positive_int(OP, "online_k", online_k)
        if warmup_steps < 0:
            fail(ValueError, OP, "warmup_steps", "0 or more", warmup_steps)
        if hypergradient_lr is not None and not hypergradient_lr > 0:
            fail(ValueError, OP, "hypergradient_lr", "None or positive", hypergradient_lr)
        check_optimizer(optimizer)
        self.model = model
        self.optimizer = optimizer
        self.selector = selector
        self.selector_optimizer = selector_optimizer
        self.schedule = schedule
        self.backend = backend
        self.hypergradient_lr = hypergradient_lr
        self.validation_mode = validation_mode
        self.selector_every = selector_every
        self.warmup_steps = warmup_steps
        self.selector_scheduler = selector_scheduler
        self.max_grad_norm = max_grad_norm
        self.track_gsnr = track_gsnr
        self.check = check
        self.steps = 0
        self._scorer = Scorer(selector, None)
        self.class_weight = class_weight
        self._teacher: Teacher = EagerTeacher(self._scorer, selector_optimizer)
        if cuda_graph:
            scheduled = selector_scheduler is not None
            self._teacher = SelectorGraph(self._scorer, selector_optimizer, scheduled=scheduled)
        self._parameters = ops.trainable_parameters(optimizer)
        self._objective = Objective(model, loss)
        self._micro_batch = micro_batch
        self._engine = make_engine(
            engine, self._objective, self._parameters, memory=memory, micro_batch=micro_batch
        )
        self._features: OnlineFeatures | OfflineFeatures = OfflineFeatures()
        if online_features:
            self._features = OnlineFeatures(
                self._objective, feature_layer, online_k, online_momentum, micro_batch
            )

    def __call__(
        self,
        inputs: Any,
        labels: Tensor,
        *,
        val_inputs: Any,
        val_labels: Tensor,
        features: Tensor | None = None,
        is_synthetic: Tensor | None = None,
        classes: Tensor | None = None,
        selector_batch: SelectorBatch | None = None,
    ) -> StepResult:
        """Take one step.

        Args:
            inputs: the training batch: a tensor [B, ...], a tuple or a dict of them.
            labels: [B] class indices, or whatever the loss takes, first axis B.
            val_inputs, val_labels: the clean validation batch, likewise.
            features: [B, F], offline features of the samples (standardised).
            is_synthetic: [B] bool or 0/1; all real where left out.
            classes: [B], the selector's class of each sample; by default the labels.
            selector_batch: a second, independent batch for the selector (rows 6 to 8).

        Raises:
            TypeError, ValueError: bad arguments, labels out of range, NaN features or losses, a
                loss that is not per sample or depends on no parameter.
            RuntimeError: an explicit backend or engine that cannot serve, with every reason.
        """
        read = self._reads(labels)
        num_classes = getattr(self.selector, "num_classes", None)
        first = SelectorBatch(inputs, labels, features, is_synthetic, classes)
        batch = check_batch(first, num_classes, read=read)
        validation = LabelledBatch(val_inputs, check_pair(val_inputs, val_labels, "val_"))
        meta = None
        if selector_batch is not None:
            meta = check_batch(selector_batch, num_classes, read=read, prefix="selector_batch.")
        learns = self.steps % self.selector_every == 0
        backend = ops.current_backend() if self.backend == "auto" else self.backend
        with ops.use_backend(backend), self._rolled_back_on_error():
            result, gradient = self._rows(batch, meta, validation, learns, read)
            set_gradients(self._parameters, gradient)
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm)
        self.optimizer.step()
        if self.selector_scheduler is not None:
            self.selector_scheduler.step()
        self.steps += 1
        return result

    @torch.no_grad()
    def weights(
        self,
        inputs: Any,
        labels: Tensor,
        *,
        val_inputs: Any,
        features: Tensor | None = None,
        is_synthetic: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Raw weights w [B] that the selector now gives to samples; nothing is changed.

        Arguments and errors as for a step. With batch-wise standardised online features
        (online_momentum=None) the weight of a sample depends on the batch it is scored in.
        """
        num_classes = getattr(self.selector, "num_classes", None)
        given = SelectorBatch(inputs, labels, features, is_synthetic, classes)
        batch = check_batch(given, num_classes, read=self._reads(labels))
        with preserved_rng(self.model):
            self._features.look_at(val_inputs)
            z = self._scorer.logits(batch, self._features.alone(batch))
            return self._scorer.weights(batch, z)

    @property
    def class_weight(self) -> Tensor | None:
        """Factor of each class in the weights, [C]; may be set between steps."""
        return self._scorer.class_weight

    @class_weight.setter
    def class_weight(self, value: Tensor | None) -> None:
        for parameter in self.selector.parameters():
            value = value if value is None else value.to(parameter.device)
        self._scorer.class_weight = value

    def _rows(
        self,
        batch: CheckedBatch,
        meta: CheckedBatch | None,
        validation: LabelledBatch,
        learns: bool,
        read: bool,
    ) -> tuple[StepResult, list[Tensor | None]]:
        """Rows 1 to 9 but for the real step: its gradient, and what to report."""
        warm = self.steps < self.warmup_steps
        reuses = learns and self.schedule == "reuse" and not warm
        own = learns and meta is None  # the selector learns on this batch
        start = RngState.capture(self._parameters)
        self._features.look_at(validation.inputs, meta if learns else None)
        # the only forward that leaves a trace in buffers and generators
        h, line = self._features.with_forward(
            batch,
            lambda: self._engine.linearize(
                batch, gradients=2 if learns and not reuses else 1, dots=own
            ),
            update=own,
        )
        # rows 1, 2
        with preserved_rng(self.model):
            z, p = self._teacher.score(batch, h, learns=own)
        val_loss = dots = self_check = gsnr = None
        if learns:
            gradient = self._gradient(line, p, read)  # row 3
            with preserved_rng(self.model):
                direction, val_loss = self._look_ahead(gradient, validation, read)
                if meta is None:
                    dots = line.dots(direction).to(z.dtype)
                    self_check = invariant_gap(p, dots, gradient, direction)
                    gsnr = self._teach(Lesson(batch, h, z, p, dots), read)
                else:
                    lesson = self._lesson(meta, direction, start)
                    dots, gsnr = lesson.dots, self._teach(lesson, read)
                if not reuses:  # row 9: weights again, with the new phi
                    z, p = self._teacher.score(batch, h, learns=False)
        if warm:
            p = self._scorer.unweighted(batch, z)
        if not reuses:
            gradient = self._gradient(line, p, read)
        z = z.detach()
        result = StepResult(
            losses=line.losses,
            loss=(p * line.losses).sum(),
            logits=z,
            weights=self._scorer.weights(batch, z),
            normalized_weights=p,
            val_loss=val_loss,
            dots=dots,
            self_check=self_check,
            gsnr=gsnr,
        )
        return result, gradient

    def _gradient(self, line: Linearization, p: Tensor, read: bool) -> list[Tensor | None]:
        """sum_i p_i grad l_i, the losses looked at."""
        gradient = line.gradient(p)
        if read:
            hint = "the inputs or the model are broken"
            check_finite(OP, "the loss of every training sample", line.losses, hint)
        return gradient

    def _look_ahead(
        self, gradient: list[Tensor | None], validation: LabelledBatch, read: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Rows 4 and 5: (kappa v, validation loss at theta')."""
        virtual = ops.virtual_update(self.optimizer, gradient)
        val_loss, v = validation_gradient(
            self._objective,
            self._parameters,
            virtual.parameters,
            validation,
            train_mode=self.validation_mode == "train",
            micro_batch=self._micro_batch,
        )
        if read:
            check_finite(OP, "the validation loss", val_loss, "the validation batch is broken")
        return virtual.scale(v, self.hypergradient_lr), val_loss

    def _lesson(self, meta: CheckedBatch, direction: list[Tensor], start: RngState) -> Lesson:
        """Rows 1, 2 and 6 on the selector's own batch, with the masks of the training forward."""
        with preserved_rng(self.model, start), preserved_buffers(self.model):
            h, line = self._features.with_forward(
                meta, lambda: self._engine.linearize(meta, gradients=0), update=True
            )
        z, p = self._teacher.score(meta, h, learns=True)
        return Lesson(meta, h, z, p, line.dots(direction).to(z.dtype))

    def _teach(self, lesson: Lesson, read: bool) -> Tensor | None:
        """Rows 7 and 8; returns the GSNR where it is tracked."""
        if read:
            check_finite(OP, "the hypergradient dot of every sample", lesson.dots)
        gsnr = None
        if self.track_gsnr:
            arguments = self._scorer.arguments(lesson.batch, lesson.features)
            gsnr = selector_gsnr(self.selector, arguments, lesson.cotangent())
        self._teacher.teach(lesson)
        return gsnr

    def _reads(self, labels: Tensor) -> bool:
        on_gpu = isinstance(labels, Tensor) and labels.is_cuda
        return self.check == "always" or (self.check == "auto" and not on_gpu)

    @contextmanager
    def _rolled_back_on_error(self) -> Iterator[None]:
        """Put buffers, generators and running statistics back when something raises inside."""
        running = self._features.state_dict()
        try:
            with restored_on_error(self.model):
                yield
        except BaseException:
            self._features.load_state_dict(running)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs but the data order and the global random generators."""
        scheduler = self.selector_scheduler
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selector": self.selector.state_dict(),
            "selector_optimizer": self.selector_optimizer.state_dict(),
            "selector_scheduler": None if scheduler is None else scheduler.state_dict(),
            "online": self._features.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; afterwards the run goes on bit for bit as the saved one would.

        The state is copied: torch's optimizers would go on to write into its tensors.
        """
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.selector.load_state_dict(state["selector"])
        self.selector_optimizer.load_state_dict(state["selector_optimizer"])
        if self.selector_scheduler is not None:
            self.selector_scheduler.load_state_dict(state["selector_scheduler"])
        self._features.load_state_dict(state["online"])
        self.steps = state["steps"]
