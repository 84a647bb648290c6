"""What an MTSStep consists of, for the files that run it and save it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mts_fast._isolation import World
from mts_fast.distributed import Ranks
from mts_fast.hypergradient import EngineChoice, Objective
from mts_fast.training.accumulated import Waiting
from mts_fast.training.arguments import check_class_weight
from mts_fast.training.call import Call
from mts_fast.training.pending_gap import PendingGap
from mts_fast.training.sampled.compute import ComputeChoice
from mts_fast.training.selector_inputs import OfflineFeatures, OnlineFeatures
from mts_fast.training.selector_trainer import Scorer, SelectorTrainer

if TYPE_CHECKING:
    from mts_fast.training.step_graph import StepGraph


class StepParts:
    """Attributes of `MTSStep`, which sets them; those without underscore are its arguments."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    selector: nn.Module
    selector_optimizer: torch.optim.Optimizer
    schedule: str
    backend: str
    hypergradient_lr: float | None
    validation_mode: str
    val_objective: str
    accumulate: int
    selector_every: int
    warmup_steps: int
    selector_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    max_grad_norm: float | None
    clip_virtual_step: bool
    scaler: torch.amp.GradScaler | None
    atomic: bool | None
    track_gsnr: bool
    candidate_dtype: torch.dtype | None
    check: str
    process_group: Any
    steps: int  # completed calls
    skipped_steps: int  # of these, calls whose gradient overflowed
    _scorer: Scorer
    _trainer: SelectorTrainer
    _objective: Objective
    _validation: Objective
    _world: World  # of the model, both losses and the selector
    _micro_batch: int | None
    _compute: ComputeChoice
    _trainable: list[Tensor]  # the optimizer's trainable parameters
    _engines: EngineChoice
    _features: OnlineFeatures | OfflineFeatures
    _graph: StepGraph | None  # the recordings of the whole step, where they are asked for
    _gap: PendingGap | None  # of the last call, where it was not waited for
    _owns_scaler: bool
    _knows_writes: bool  # whether it is known which parameters a forward writes to
    _running: Call | None
    _ranks: Ranks
    _waiting: list[Waiting]  # of the calls that wait for the rest of their step
    _streams_calls: bool  # whether each of these is a micro-batch
    _was_compared: bool  # whether ranks have compared the values of their parameters
    _torn: str  # a tensor that an optimizer had changed before it raised

    @property
    def compute(self) -> int | float | str | None:
        """How many samples of a batch are computed; may be set between steps."""
        return self._compute.option

    @compute.setter
    def compute(self, value: int | float | str | None) -> None:
        self._compute = ComputeChoice(value)

    @property
    def class_weight(self) -> Tensor | None:
        """Factor of each class in the weights, [C]; may be set between steps."""
        return self._scorer.class_weight

    @class_weight.setter
    def class_weight(self, value: object) -> None:
        like = next(self.selector.parameters())
        num_classes = getattr(self.selector, "num_classes", None)
        self._scorer.class_weight = check_class_weight(value, num_classes, like)
