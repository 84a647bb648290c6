"""MTSStep: one step of classifier and selector, in your own training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import check_finite
from mts_fast._isolation import World, preserved_buffers, preserved_rng
from mts_fast.distributed import ranks_of, unwrapped
from mts_fast.hypergradient import EngineChoice, LabelledBatch, Loss, Objective
from mts_fast.training.accumulated import Arguments
from mts_fast.training.arguments import check_options, check_parts
from mts_fast.training.batch import SelectorBatch, SelectorRows, check_batch
from mts_fast.training.checked_call import checked_call, checks_values, num_classes
from mts_fast.training.checkpoint import check_complete, load_state, state_of
from mts_fast.training.result import StepResult
from mts_fast.training.running import refresh_worlds, run_call
from mts_fast.training.selector_inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.selector_trainer import EagerSelectorTrainer, Scorer
from mts_fast.training.selector_trainer_graph import GraphedSelectorTrainer
from mts_fast.training.sharded import check_sharded
from mts_fast.training.step_graph import StepGraph
from mts_fast.training.step_parts import StepParts

OP = "MTSStep"


class MTSStep(StepParts):
    """Meta-learned selection of training data, one call per training batch.

    Each call weights the batch with the selector, looks one virtual optimizer step ahead, measures
    the validation loss there, moves the selector down its hypergradient, weights the batch again
    and takes the real optimizer step (rows 1 to 9). It takes the place of forward, backward,
    `optimizer.step()` and `zero_grad()` in your loop; mode, autocast and learning-rate schedules
    stay yours.

    Args:
        model: the classifier, any nn.Module; run in the mode that you left it in.
        optimizer: of the model, any parameter groups: SGD, Adam, AdamW, or another with an update
            rule (`register_update_rule`).
        selector: `Selector`, or any module that returns a logit per sample [B] or [B, 1] from
            (features [B, F], classes [B], is_synthetic [B]).
        selector_optimizer: of the selector, any torch optimizer.
        engine: of row 6: "ghost", "forward_mode", "double_backward", "finite_difference", or
            "auto", the first of these that serves the batch; `explain_engine` says which and why.
        schedule: "exact" weights the classifier's step by the selector as updated in this call (row
            9), "reuse" as it was before (row 2), which saves a backward.
        memory: of the ghost engine: "fast", or "low", which recomputes output gradients
            instead of storing them.
        compute: how many samples of each batch are computed, the rest being scored by one forward
            without a graph: a number, a share of the batch such as 0.25, "auto" (what pays best, by
            measured variance), or None, all. The step is that of the whole batch up to the noise of
            the draw (docs/sampling.md). Draws come from torch's default generator.
        candidate_dtype: torch.bfloat16 or float16 runs that one forward under autocast, where the
            hardware is faster at it; what is computed of the samples drawn keeps its precision.
        micro_batch: run that many samples at a time; peak memory follows it. The result is that of
            the whole batch where samples are independent; BatchNorm in train mode sees each
            micro-batch, as under data parallelism.
        accumulate: how many calls make a step: those before the last keep their batch (inputs, not
            activations) and return None, the last runs all of them as one batch, each call's
            samples as a micro-batch unless micro_batch says otherwise. Give each its own part of
            the validation set: it is joined, too. `drop_waiting()` forgets an unfinished step.
        backend: "reference", "triton" or "cpp", for all ops inside; "auto" leaves the choice to
            `use_backend` and MTS_FAST_BACKEND around the call.
        loss: (output, labels) -> per-sample losses [B]; cross-entropy of the logits by default;
            with label smoothing torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none").
        val_loss: likewise for the validation samples; by default that of the training samples.
        val_objective: "mean" of the validation losses (weighted by val_weights), "group_balanced":
            the mean over groups of their means, "worst_group": the largest of these.
        class_weight: [C] finite numbers, factor of each class in the weights (row 1); 0 or more.
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
        max_grad_norm: clips the classifier's real gradient to this norm.
        clip_virtual_step: clip the virtual step's gradient to max_grad_norm, too, and take the
            hypergradient through the clip; without it the virtual step is not clipped.
        scaler: a torch.amp.GradScaler for float16 autocast: every backward runs at its scale, and
            a step whose gradient overflows is skipped, counted in `skipped_steps` and reported as
            `result.skipped`. Under float16 autocast without one, the step makes its own, and
            lowers its scale in place of skipping where it can.
        atomic: undo the classifier's `optimizer.step()`, too, when it raises or is interrupted,
            from a copy of parameters and optimizer state taken just before it. None copies where
            that is at most 256 MB; False never: then the error says so if parameters have moved,
            and further calls are refused until a state is loaded.
        track_gsnr: estimate the GSNR of the selector's gradient in every selector step.
        cuda_graph: replay the selector's part of the step (rows 1, 2, 7 and 8), dozens of tiny
            launches, as CUDA graphs, recorded after a few calls of each batch size. Needs the
            selector on a GPU, without dropout and BatchNorm, and an optimizer made with
            capturable=True, or SGD (lr as a tensor, and SGD fused, where there is a scheduler).
            "step": the whole step as one graph, where shapes and memory stay the same and values
            are not checked; both optimizers as above. Calls 1, 2, 4, 8, ..., and what a graph
            cannot hold, run without one, and the log says why.
        check: "auto" checks values (finite, in range) where tensors are on the CPU; "always"
            also on a GPU, which waits for it; "never".
        process_group: the torch.distributed group whose ranks take each step together, each with
            its own part of every batch (docs/scaling.md). "auto": that of a model wrapped in
            DistributedDataParallel, else all ranks where torch.distributed is initialised; None:
            this process alone.

    Notes:
        A call leaves BatchNorm buffers and random generators bitwise as one plain weighted step
        would, and the classifier and its optimizer, too; with the ghost engine their gradient is
        that step's to rounding. Generators are torch's default ones, numpy's global one and
        Python's; one of the model's own is not seen. A selector that draws or has BatchNorm moves
        them by one forward of the batch that it learns from. With `compute` the draw moves torch's
        generator, too, and only BatchNorm's buffers see the whole batch.

        When a call raises, nothing has changed: parameters, `.grad`, buffers, modes, optimizers,
        selector, scheduler, generators, counters. In the main thread Ctrl-C is held until the step
        is complete, and raised then; a second one undoes the step at once.

        The dots of calls 1, 2, 4, 8, ... of every kind of batch are compared with the gradient
        (`StepResult.self_check`) before anything is written: where they differ, "auto" repeats the
        step with the next engine, and an explicit engine raises. In between, a warning is logged at
        the next call. Labels of a causal language model are compared as they are: shift them.

    Source: rows 1 to 9 of docs/algorithm.md; Du, Zhao, Li, arXiv 2606.00571.

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
        compute: int | float | str | None = None,
        candidate_dtype: torch.dtype | None = None,
        micro_batch: int | None = None,
        accumulate: int = 1,
        backend: str = "auto",
        loss: Loss | None = None,
        val_loss: Loss | None = None,
        val_objective: str = "mean",
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
        clip_virtual_step: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        atomic: bool | None = None,
        track_gsnr: bool = False,
        cuda_graph: bool | str = False,
        check: str = "auto",
        process_group: Any = "auto",
    ) -> None:
        check_options(
            {
                "schedule": schedule,
                "backend": backend,
                "loss": loss,
                "val_loss": val_loss,
                "val_objective": val_objective,
                "hypergradient_lr": hypergradient_lr,
                "validation_mode": validation_mode,
                "online_features": online_features,
                "online_k": online_k,
                "online_momentum": online_momentum,
                "feature_layer": feature_layer,
                "accumulate": accumulate,
                "selector_every": selector_every,
                "warmup_steps": warmup_steps,
                "max_grad_norm": max_grad_norm,
                "clip_virtual_step": clip_virtual_step,
                "scaler": scaler,
                "atomic": atomic,
                "track_gsnr": track_gsnr,
                "cuda_graph": cuda_graph,
                "check": check,
                "candidate_dtype": candidate_dtype,
            }
        )
        objective = Objective(unwrapped(model), loss) if isinstance(model, nn.Module) else None
        losses = [] if objective is None else list(objective.world.roots[1:])
        check_parts(model, optimizer, selector, selector_optimizer, selector_scheduler, losses)
        assert objective is not None
        self.model = model
        self.optimizer = optimizer
        self.selector = selector
        self.selector_optimizer = selector_optimizer
        self.schedule = schedule
        self.backend = backend
        self.hypergradient_lr = hypergradient_lr
        self.validation_mode = validation_mode
        self.val_objective = val_objective
        self.selector_every = selector_every
        self.warmup_steps = warmup_steps
        self.selector_scheduler = selector_scheduler
        self.max_grad_norm = max_grad_norm
        self.clip_virtual_step = clip_virtual_step
        self.scaler = scaler
        self.atomic = atomic
        self.track_gsnr = track_gsnr
        self.check = check
        self.process_group = process_group
        if objective.sharding is not None:
            check_sharded(objective.sharding, optimizer, scaler)
        self._ranks = ranks_of(OP, model, process_group, objective.sharding)
        self.steps = 0
        self.skipped_steps = 0
        self._scorer = Scorer(unwrapped(selector), None)
        self.class_weight = class_weight
        self._trainer = EagerSelectorTrainer(self._scorer, selector_optimizer)
        self._graph = None
        if cuda_graph == "step":
            self._graph = StepGraph.of(optimizer, selector_optimizer)
        elif cuda_graph:
            scheduled = selector_scheduler is not None
            self._trainer = GraphedSelectorTrainer(
                self._scorer, selector_optimizer, scheduled=scheduled
            )
        self._objective = objective
        self._validation = objective
        if val_loss is not None:
            sharding = objective.sharding
            self._validation = Objective(objective.model, val_loss, sharding=sharding)
        self._world = World(
            *dict.fromkeys(
                (*objective.world.roots, *self._validation.world.roots, self._scorer.selector)
            )
        )
        self._micro_batch = micro_batch
        self.accumulate = accumulate
        self._waiting = []
        self._streams_calls = micro_batch is None and accumulate > 1
        self.compute = compute
        self.candidate_dtype = candidate_dtype
        self._trainable = ops.trainable_parameters(optimizer)
        parameters = objective.tensors_of(self._trainable)
        across = self._ranks.size > 1
        self._engines = EngineChoice(
            objective, parameters, engine, memory, micro_batch, across_ranks=across
        )
        self._features = OfflineFeatures()
        if online_features:
            self._features = OnlineFeatures(
                objective, feature_layer, online_k, online_momentum, micro_batch
            )
        self._gap = None
        self._owns_scaler = False
        self._knows_writes = False
        self._running = None
        self._torn = ""
        self._was_compared = False

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
        val_weights: Tensor | None = None,
        val_groups: Tensor | None = None,
    ) -> StepResult:
        """Take one step; with accumulate=n, None in the calls before its n-th.

        Args:
            inputs: the training batch: a tensor [B, ...], a tuple or a dict of them.
            labels: [B] class indices, or whatever the loss takes, first axis B.
            val_inputs, val_labels: the clean validation batch, likewise.
            features: [B, F], offline features of the samples (standardised).
            is_synthetic: [B] bool or 0/1; all real where left out.
            classes: [B], the selector's class of each sample; by default the labels.
            selector_batch: a second, independent batch for the selector (rows 6 to 8).
            val_weights: [V], 0 or more, each validation sample's share of its loss.
            val_groups: [V] integers, the group of each; for val_objective other than "mean".

        Raises:
            TypeError, ValueError: bad arguments, labels out of range, NaN features or losses, a
                loss that is not per sample or depends on no parameter; the first link of the
                computation that is not finite is named.
            RuntimeError: an explicit backend or engine that cannot serve, with every reason; a
                call without gradients enabled, or after a step that was torn (see `atomic`).
        """
        samples = SelectorBatch(inputs, labels, features, is_synthetic, classes)
        call = checked_call(
            self,
            Arguments(samples, selector_batch, val_inputs, val_labels, val_weights, val_groups),
        )
        if call is None:
            return None  # type: ignore[return-value]
        result = run_call(self, call)
        self._waiting.clear()
        return result

    @torch.no_grad()
    def weights(
        self,
        inputs: Any,
        labels: Tensor,
        *,
        val_inputs: Any = None,
        features: Tensor | None = None,
        is_synthetic: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Raw weights w [B] that the selector currently gives to samples; nothing is changed.

        Arguments and errors as for a step; without online features no `val_inputs` are read. With
        batch-wise standardised online features (online_momentum=None) the weight of a sample
        depends on the batch it is scored in.
        """
        samples = SelectorBatch(inputs, labels, features, is_synthetic, classes)
        check_values = checks_values(self, labels)
        batch = check_batch(samples, num_classes(self), check_values=check_values)
        refresh_worlds(self)
        with preserved_rng(self._world), preserved_buffers(self._world):
            if isinstance(self._features, OnlineFeatures):
                inputs = LabelledBatch(val_inputs, batch.labels)
                self._features.validation = self._features.of_validation(inputs, None)
            h = self._features.standardized(self._features.columns(batch), update=False)
            rows = SelectorRows(batch.classes, batch.is_synthetic)
            z = self._scorer.logits(rows, h)
            if check_values:
                check_finite(OP, "features of the samples", h, "inputs, val_inputs or the model")
                check_finite(OP, "selector's output", z, "the selector has diverged")
            return self._scorer.weights(rows, z)

    def drop_waiting(self) -> int:
        """Forget the batches that wait for the rest of their step (accumulate=); how many.

        Over several ranks every rank calls it.
        """
        number = len(self._waiting)
        self._waiting.clear()
        return number

    def __repr__(self) -> str:
        backend = ops.current_backend() if self.backend == "auto" else self.backend
        names = f"{type(self.model).__name__}, {type(self.optimizer).__name__}"
        return (
            f"MTSStep({names}, schedule={self.schedule!r}, backend={backend!r},"
            f" steps={self.steps}): {self._engines}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs but the data order and the global random generators.

        Raises:
            RuntimeError: batches wait for the rest of their step (accumulate=).
        """
        check_complete(self)
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state; afterwards the run goes on bit for bit as the saved one would.

        The state is copied: torch's optimizers would go on to write into its tensors. A state
        that does not fit changes nothing.

        Raises:
            TypeError, ValueError, RuntimeError: a state that is not one, is of another version, or
                of other modules, optimizers or options.
        """
        load_state(self, state)
