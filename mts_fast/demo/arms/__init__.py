"""The arms of the comparison: what each is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mts_fast.demo.arms import filters, learned, plain
from mts_fast.demo.arms.seed_run import Train

Role = Literal["baseline", "ours", "ablation", "reference"]


@dataclass(frozen=True)
class Arm:
    """One arm; an ablation is ours with a part taken out, a reference knows what no user does,
    such as the kind of every sample."""

    train: Train
    role: Role
    # only where the real data have the bias that one wants to be rid of, and groups are known
    needs_bias: bool = False
    needs_package: str | None = None


# in the order of the table
ARMS = {
    "everything alike": Arm(plain.everything_alike, "baseline"),
    "real + validation": Arm(plain.real_and_validation, "baseline"),
    "validation alone": Arm(plain.validation_alone, "baseline", needs_bias=True),
    "everything + validation": Arm(plain.everything_and_validation, "baseline"),
    "last layer on validation": Arm(plain.last_layer_on_validation, "baseline"),
    "small loss": Arm(filters.small_loss, "baseline"),
    "filter by validation": Arm(filters.filter_by_validation, "baseline"),
    "filter by real + validation": Arm(filters.filter_by_real, "baseline", needs_bias=True),
    "filter twice": Arm(filters.filter_twice, "baseline"),
    "reducible holdout loss": Arm(filters.reducible_holdout_loss, "baseline"),
    "likely if clean, not easy": Arm(filters.clean_but_not_easy, "baseline"),
    "just train twice": Arm(filters.just_train_twice, "baseline"),
    "confident learning": Arm(filters.confident_learning, "baseline", needs_package="cleanlab"),
    "loss-only selector": Arm(learned.loss_only, "baseline"),
    "MTS itself": Arm(learned.mts, "ours"),
    "MTS weights": Arm(learned.mts_weights, "ours"),
    "MTS weights, last layer on validation": Arm(learned.mts_last_layer, "ours"),
    "the recipe without MTS": Arm(filters.clean_but_not_easy, "ablation"),
    "group DRO, true groups": Arm(plain.group_dro, "reference", needs_bias=True),
    "oracle": Arm(plain.oracle, "reference"),
}
