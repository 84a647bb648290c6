"""The ghost engine: dots and weighted gradients from layer inputs and output gradients."""

from mts_fast.hypergradient.ghost.capture import Capture
from mts_fast.hypergradient.ghost.engine import Ghost
from mts_fast.hypergradient.ghost.parts import DensePart, OuterPart, ScatteredPart
from mts_fast.hypergradient.ghost.reasons import Unsupported
from mts_fast.hypergradient.ghost.rules import LayerCall, register_layer
from mts_fast.hypergradient.ghost.sample_axis import SampleAxis

__all__ = [
    "Capture",
    "DensePart",
    "Ghost",
    "LayerCall",
    "OuterPart",
    "SampleAxis",
    "ScatteredPart",
    "Unsupported",
    "register_layer",
]
