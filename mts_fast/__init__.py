"""mts_fast: meta-learning for training-data selection (MTS), fast, on any torch model.

`MTSStep` takes the place of the training step in your loop. `mts_fast.reference` says what every
function computes, in plain PyTorch. Names are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mts_fast._version import __version__

if TYPE_CHECKING:
    import mts_fast.diagnostics as diagnostics
    import mts_fast.features as features
    import mts_fast.hypergradient as hypergradient
    import mts_fast.reference as reference
    import mts_fast.sampling as sampling
    import mts_fast.selection as selection
    import mts_fast.training as training
    from mts_fast.backends.verdicts.requests import record_requests
    from mts_fast.hypergradient import check_engine, explain_engine, hypergradient_dots
    from mts_fast.ops import (  # type: ignore[no-redef]  # modules of ops have these names, too
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

__all__ = [
    "LionRule",
    "MTSStep",
    "Selector",
    "SelectorBatch",
    "StepResult",
    "UpdateRule",
    "__version__",
    "check_engine",
    "diagnostics",
    "explain_engine",
    "features",
    "hypergradient",
    "hypergradient_dots",
    "linear_cross_entropy",
    "normalize_weights",
    "record_requests",
    "reference",
    "register_update_rule",
    "sampling",
    "selection",
    "selector_gradient",
    "training",
    "use_backend",
    "virtual_update",
    "weighted_cross_entropy",
]

# module -> the names it defines; a name of __all__ that is not listed here is a module
_NAMES_OF = {
    "mts_fast.backends.verdicts.requests": ("record_requests",),
    "mts_fast.hypergradient": ("check_engine", "explain_engine", "hypergradient_dots"),
    "mts_fast.ops": (
        "linear_cross_entropy",
        "normalize_weights",
        "register_update_rule",
        "selector_gradient",
        "use_backend",
        "virtual_update",
        "weighted_cross_entropy",
    ),
    "mts_fast.reference.update_rules": ("LionRule", "UpdateRule"),
    "mts_fast.training": ("MTSStep", "Selector", "SelectorBatch", "StepResult"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in __all__:
        value = importlib.import_module(f"mts_fast.{name}")
    else:
        names = ", ".join(__all__)
        raise AttributeError(
            f"mts_fast: name must be one of {names}, got {name!r}; see help(mts_fast)"
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
