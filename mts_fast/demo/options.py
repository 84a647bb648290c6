"""Options of each arm, chosen on seeds 0 to 5 with 12 trials for every arm.

Made by benchmarks/evidence/tune.py, which has the grids; all scores are in
benchmarks/results/evidence.
"""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

_FILE = importlib.resources.files("mts_fast.demo").joinpath("options.json")
OPTIONS: dict[str, dict[str, dict[str, Any]]] = json.loads(_FILE.read_text())
# arms that take those of another
_SHARED = {"MTS weights, last layer on validation": "MTS weights"}


def options_of(data: str, arm: str) -> dict[str, Any]:
    """Options of an arm on one data set; none where they were not tuned."""
    return OPTIONS.get(data, {}).get(_SHARED.get(arm, arm), {})
