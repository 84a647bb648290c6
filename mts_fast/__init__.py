"""mts_fast: meta-learning for training-data selection (MTS), fast, on any torch model.

`MTSStep` takes the place of the training step in your loop. `mts_fast.reference` says what every
function computes, in plain PyTorch.
"""

from mts_fast import diagnostics, features, hypergradient, reference, training
from mts_fast.hypergradient import check_engine, explain_engine, hypergradient_dots
from mts_fast.ops import (
    linear_cross_entropy,
    normalize_weights,
    register_update_rule,
    selector_gradient,
    use_backend,
    virtual_update,
    weighted_cross_entropy,
)
from mts_fast.reference.update_rules import LionRule, UpdateRule
from mts_fast.training import MTSStep, Selector, SelectorBatch, StepResult

__version__ = "0.1.0"

__all__ = [
    "LionRule",
    "MTSStep",
    "Selector",
    "SelectorBatch",
    "StepResult",
    "UpdateRule",
    "check_engine",
    "diagnostics",
    "explain_engine",
    "features",
    "hypergradient",
    "hypergradient_dots",
    "linear_cross_entropy",
    "normalize_weights",
    "reference",
    "register_update_rule",
    "selector_gradient",
    "training",
    "use_backend",
    "virtual_update",
    "weighted_cross_entropy",
]
