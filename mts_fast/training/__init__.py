"""The training step, its result, the selector and its schedule."""

from mts_fast.training.batch import SelectorBatch
from mts_fast.training.result import StepResult
from mts_fast.training.selector import Selector, parameter_groups, warmup_cosine
from mts_fast.training.step import MTSStep

__all__ = [
    "MTSStep",
    "Selector",
    "SelectorBatch",
    "StepResult",
    "parameter_groups",
    "warmup_cosine",
]
