"""Options of each arm, chosen on seeds 0 to 11 with 24 trials for every arm.

Made by benchmarks/evidence/tune.py; grids and scores are in benchmarks/results/evidence.
"""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "coloured-digits": {},
    "coloured-fashion": {},
    "digits": {},
    "fashion": {},
}
