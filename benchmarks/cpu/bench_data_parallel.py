"""A step over several ranks of one machine (gloo), against DistributedDataParallel's plain step.

All ranks share this machine's cores; ratios are of arms that took turns in the same processes.
Every rank has 32 images and 4 of the validation batch.
"""

import pytest
from rank_arms import times

SIZES = (1, 2, 4)
MODELS = ("vit", "resnet18_groupnorm")


@pytest.mark.parametrize("name", MODELS)
def bench_data_parallel(benchmark, name):
    rows = {}

    def measure():
        for size in SIZES:
            seconds, _ = times(name, size)
            rows[f"{size} ranks"] = {
                label: round(s / seconds["plain"], 2) for label, s in seconds.items()
            }

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["rows"] = rows
    benchmark.extra_info["ratios"] = {
        f"{label}, {ranks}": value
        for ranks, row in rows.items()
        for label, value in row.items()
        if label != "plain"
    }
