"""What one call of a step is asked, and what is known of it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mts_fast.distributed import Shard
from mts_fast.training.batch import CheckedBatch, CheckedValidation
from mts_fast.training.batch_run import Run
from mts_fast.training.result import StepResult
from mts_fast.training.sampled.compute import Costs
from mts_fast.training.sampled.part import Part
from mts_fast.training.selector_trainer import SelectorUpdate


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
    number: int  # of the steps that were completed before
    probing: bool  # the dots are checked before anything rests on them
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
    shard: Shard = field(default_factory=Shard)  # of that batch
    loss: Tensor | None = None  # [], sum p l of row 3 over all ranks, where it is reported
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
