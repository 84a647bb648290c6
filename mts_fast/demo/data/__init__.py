"""The demo's data: real images, synthetic ones of which the truth is known, clean sets."""

from mts_fast.demo.data.images import LabelledImages
from mts_fast.demo.data.scenario import CLASSES, DATA, REAL, Scenario, make_scenario

__all__ = ["CLASSES", "DATA", "REAL", "LabelledImages", "Scenario", "make_scenario"]
