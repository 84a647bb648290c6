"""MTSStep: one step of classifier and selector, in your own training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops, reference
from mts_fast._check import check_choice, check_finite, check_positive_int, fail
from mts_fast._isolation import (
    RngState,
    preserved_buffers,
    preserved_rng,
    replaced_parameters,
    training_mode,
)
from mts_fast.diagnostics import selector_gsnr
from mts_fast.hypergradient import Linearization, Loss, Objective, make_engine
from mts_fast.ops.registry import BACKENDS
from mts_fast.ops.virtual_update import check_optimizer
from mts_fast.training.batch import CheckedBatch, SelectorBatch, check_batch, check_pair
from mts_fast.training.inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.result import StepResult, relative_gap

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
        engine: how row 6 is computed: "auto", "finite_difference" or "forward_mode".
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
        check: "auto" looks at values (finite, in range) where tensors are on the CPU; "always"
            also on a GPU, which waits for it; "never".

    Notes:
        A call leaves optimizer state, BatchNorm buffers and random generators bitwise as one plain
        weighted step would. When it raises, none of them has changed.

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
        check: str = "auto",
    ) -> None:
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
        self.backend = backend
        self.class_weight = class_weight
        self.hypergradient_lr = hypergradient_lr
        self.validation_mode = validation_mode
        self.selector_every = selector_every
        self.warmup_steps = warmup_steps
        self.selector_scheduler = selector_scheduler
        self.max_grad_norm = max_grad_norm
        self.track_gsnr = track_gsnr
        self.check = check
        self.steps = 0
        self._parameters = ops.trainable_parameters(optimizer)
        self._objective = Objective(model, loss)
        self._engine = make_engine(engine, self._objective, self._parameters)
        self._features = (
            OnlineFeatures(self._objective, feature_layer, online_k, online_momentum)
            if online_features
            else OfflineFeatures()
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
            RuntimeError: an explicit backend that cannot run.
        """
        read = self._reads(labels)
        num_classes = getattr(self.selector, "num_classes", None)
        first = SelectorBatch(inputs, labels, features, is_synthetic, classes)
        batch = check_batch(first, num_classes, read=read)
        check_pair(val_inputs, val_labels, "val_")
        meta = None
        if selector_batch is not None:
            meta = check_batch(selector_batch, num_classes, read=read, prefix="selector_batch.")
        learns = self.steps % self.selector_every == 0
        backend = ops.current_backend() if self.backend == "auto" else self.backend
        with ops.use_backend(backend), self._rolled_back_on_error():
            result, gradient = self._forward(batch, meta, (val_inputs, val_labels), learns, read)
            for parameter, g in zip(self._parameters, gradient, strict=True):
                parameter.grad = g
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
        kept = self._features.state_dict()
        with preserved_rng(self.model):
            h, _ = self._features(batch, None, val_inputs)
            z = self._logits(batch, h)
        self._features.load_state_dict(kept)
        return reference.log_weights(z, self._class_weight(batch)).exp()

    def _forward(
        self,
        batch: CheckedBatch,
        meta: CheckedBatch | None,
        validation: tuple[Any, Tensor],
        learns: bool,
        read: bool,
    ) -> tuple[StepResult, list[Tensor | None]]:
        """Rows 1 to 9 but for the real step: its gradient, and what to report."""
        h, h_meta = self._features(batch, meta, validation[0])
        start = RngState.capture(self._parameters)
        # row 3, the only forward that leaves a trace in buffers and generators
        line = self._engine.linearize(batch.inputs, batch.labels)
        if read:
            hint = "the inputs or the model are broken"
            check_finite(OP, "the loss of every training sample", line.losses, hint)
        val_loss = dots = self_check = gsnr = None
        with preserved_rng(self.model):
            if learns:
                val_loss, dots, self_check, gsnr = self._selector_step(
                    batch, meta, validation, h, h_meta, line, start, read
                )
            # row 9: weights again, with the new phi
            with torch.no_grad():
                z = self._logits(batch, h)
        log_w = reference.log_weights(z, self._class_weight(batch))
        if self.steps < self.warmup_steps:
            p = self._unweighted(batch, line.losses)
        else:
            p = ops.normalize_weights(z, class_weight=self._class_weight(batch))
        gradient = line.gradient(p, last=True)
        result = StepResult(
            losses=line.losses,
            loss=(p * line.losses).sum(),
            logits=z,
            weights=log_w.exp(),
            normalized_weights=p,
            val_loss=val_loss,
            dots=dots,
            self_check=self_check,
            gsnr=gsnr,
        )
        return result, gradient

    def _selector_step(
        self,
        batch: CheckedBatch,
        meta: CheckedBatch | None,
        validation: tuple[Any, Tensor],
        h: Tensor,
        h_meta: Tensor | None,
        line: Linearization,
        start: RngState,
        read: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Rows 1 to 8; returns val_loss, dots, self_check and the GSNR."""
        # rows 1, 2
        z = self._logits(batch, h)
        p = ops.normalize_weights(z.detach(), class_weight=self._class_weight(batch))
        # rows 3, 4
        gradient = line.gradient(p)
        virtual = ops.virtual_update(self.optimizer, gradient)
        # row 5
        val_loss, v = self._validation_gradient(virtual.parameters, *validation)
        # row 6, on the selector's batch
        direction = virtual.scale(v, self.hypergradient_lr)
        if meta is None or h_meta is None:
            dots = line.dots(direction).to(z.dtype)
            along = [
                (g * u).sum() for g, u in zip(gradient, direction, strict=True) if g is not None
            ]
            self_check = relative_gap((p * dots).sum(), torch.stack(along).sum())
            used, h_used = batch, h
        else:
            used, h_used = meta, h_meta
            dots = self._engine.dots(meta.inputs, meta.labels, direction, rng=start).to(z.dtype)
            self_check = None  # the invariant holds within one batch
            z = self._logits(meta, h_meta)
            p = ops.normalize_weights(z.detach(), class_weight=self._class_weight(meta))
        if read:
            check_finite(OP, "the validation loss", val_loss, "the validation batch is broken")
            check_finite(OP, "the hypergradient dot of every sample", dots)
        # rows 7, 8
        cotangent = ops.selector_gradient(dots, z.detach(), p)
        gsnr = None
        if self.track_gsnr:
            gsnr = selector_gsnr(self.selector, self._arguments(used, h_used), cotangent)
        self.selector_optimizer.zero_grad(set_to_none=True)
        z.backward(cotangent)
        self.selector_optimizer.step()
        return val_loss, dots, self_check, gsnr

    def _validation_gradient(
        self, theta: list[Tensor], val_inputs: Any, val_labels: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Row 5: mean validation loss at theta', with the BatchNorm statistics as they are now."""
        with (
            training_mode(self.model, self.validation_mode == "train"),
            preserved_buffers(self.model),
            replaced_parameters(self._parameters, theta),
        ):
            loss = self._objective.losses(val_inputs, val_labels).mean()
            v = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return loss.detach(), list(v)

    def _logits(self, batch: CheckedBatch, h: Tensor) -> Tensor:
        """The selector's logits z [B], in float32 at least: autocast would round p to 3 digits."""
        z = self.selector(*self._arguments(batch, h))
        expected = (len(batch.labels),)
        if z.shape not in (expected, (*expected, 1)):
            fail(ValueError, OP, "selector's output", f"logits {expected}", tuple(z.shape))
        return z.reshape(expected).to(torch.promote_types(z.dtype, torch.float32))

    def _arguments(self, batch: CheckedBatch, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the selector is called with: features in its dtype, classes, is_synthetic."""
        dtype = next((p.dtype for p in self.selector.parameters()), h.dtype)
        return h.to(dtype), batch.classes, batch.is_synthetic

    def _class_weight(self, batch: CheckedBatch) -> Tensor | None:
        """The class weight of each sample [B]."""
        if self.class_weight is None:
            return None
        return self.class_weight.to(batch.classes.device)[batch.classes]

    def _unweighted(self, batch: CheckedBatch, like: Tensor) -> Tensor:
        """p [B] of a selector that trusts every sample alike."""
        zeros = torch.zeros_like(like)
        return ops.normalize_weights(zeros, class_weight=self._class_weight(batch))

    def _reads(self, labels: Tensor) -> bool:
        on_gpu = isinstance(labels, Tensor) and labels.is_cuda
        return self.check == "always" or (self.check == "auto" and not on_gpu)

    @contextmanager
    def _rolled_back_on_error(self) -> Iterator[None]:
        """Put buffers, generators and running statistics back when something raises inside."""
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        rng = RngState.capture(self._parameters)
        running = self._features.state_dict()
        try:
            yield
        except BaseException:
            for buffer, before in buffers:
                buffer.data.copy_(before)
            rng.restore()
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
