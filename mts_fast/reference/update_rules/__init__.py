"""What one step of an optimizer does to one tensor, optimizer by optimizer."""

from mts_fast.reference.update_rules.adam import AdamRule, AdamState
from mts_fast.reference.update_rules.lion import LionRule
from mts_fast.reference.update_rules.muon import MuonRule
from mts_fast.reference.update_rules.nadam import NAdamRule, NAdamState
from mts_fast.reference.update_rules.noise import is_noise, largest_gradient, noise_share
from mts_fast.reference.update_rules.radam import RAdamRule, RAdamState
from mts_fast.reference.update_rules.rmsprop import RMSpropRule, RMSpropState
from mts_fast.reference.update_rules.rule import ElementwiseState, RuleState, State, UpdateRule
from mts_fast.reference.update_rules.sgd import SGDRule, SGDState

__all__ = [
    "AdamRule",
    "AdamState",
    "ElementwiseState",
    "LionRule",
    "MuonRule",
    "NAdamRule",
    "NAdamState",
    "RAdamRule",
    "RAdamState",
    "RMSpropRule",
    "RMSpropState",
    "RuleState",
    "SGDRule",
    "SGDState",
    "State",
    "UpdateRule",
    "is_noise",
    "largest_gradient",
    "noise_share",
]
