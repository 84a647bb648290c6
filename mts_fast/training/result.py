"""Results of one step, for logging. Every value stays a tensor until you read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mts_fast.diagnostics import SamplingStatistics, WeightStatistics, weight_statistics


@dataclass(frozen=True, repr=False)
class StepResult:
    """Tensors of one step, detached. B is the training batch, B2 the selector's batch; over several
    ranks those of this rank, and sums, means and `statistics` are those of all.

    val_loss, dots and self_check are None in a step that does not update the selector;
    self_check also where the selector had a batch of its own.
    """

    losses: Tensor  # [B], at the parameters before the step
    loss: Tensor  # [], sum of normalized_weights * losses: the classifier's training loss
    logits: Tensor  # [B], the selector's outputs that the classifier's weights came from
    weights: Tensor  # [B], w: sigmoid(logits) times class weight
    normalized_weights: Tensor  # [B], p of the classifier's step; uniform during warm-up
    val_loss: Tensor | None  # [], mean validation loss at the virtual parameters
    dots: Tensor | None  # [B2], d_i = <kappa v, grad l_i>
    # [], |sum_i p_i d_i - <kappa v, grad L>| / sum_i p_i |d_i|, at most 0.02 where dots are right
    # and the losses are not 0 up to rounding
    self_check: Tensor | None
    gsnr: Tensor | None  # [], of the selector's gradient; only with track_gsnr
    engine: str  # the engine that served this batch; see `explain_engine`
    # [], entries of kappa set to 0, their second moment being rounding noise (Adam and the like)
    masked_entries: Tensor | None
    # of a step that computed a part of its batch (`compute`): losses are of stage 1, and dots the
    # estimates of the regression, up to a constant
    sampling: SamplingStatistics | None = None
    # w and p of the samples of all ranks; None where they are those above
    of_all_ranks: tuple[Tensor, Tensor] | None = None
    skipped: bool = False  # a gradient overflowed under loss scaling: no parameter has moved

    def __repr__(self) -> str:
        """Sizes and the engine; reading values would wait for the device."""
        learned = "" if self.dots is None else f", selector learned from {len(self.dots)}"
        skipped = ", skipped" if self.skipped else ""
        return f"StepResult(engine={self.engine!r}, {len(self.losses)} samples{learned}{skipped})"

    @property
    def statistics(self) -> WeightStatistics:
        """Concentration of the classifier's weights (the paper's Figure 2)."""
        w, p = self.of_all_ranks or (self.weights, self.normalized_weights)
        statistics = weight_statistics(w, p)
        computed = None if self.sampling is None else self.sampling.computed
        return replace(statistics, masked_entries=self.masked_entries, computed=computed)

    def as_skipped(self) -> StepResult:
        """The same of a step that loss scaling has skipped."""
        return replace(self, skipped=True)
