"""The ghost engine: dots and weighted gradients from layer inputs and output gradients."""

from mts_fast.hypergradient.ghost.capture import Capture
from mts_fast.hypergradient.ghost.engine import Ghost
from mts_fast.hypergradient.ghost.recorded import Unsupported
from mts_fast.hypergradient.ghost.rules import LayerCall, register_layer

__all__ = ["Capture", "Ghost", "LayerCall", "Unsupported", "register_layer"]
