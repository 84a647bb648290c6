"""`mts-fast features` on a pool in files, and interruptions of its sweep."""

import os

from pools import many

from mts_fast.cli.main import main
from mts_fast.features import DistributionSweep, FeatureTable

X, Y, S = many()


def run(pool, tmp_path, *options):
    return main(["features", *pool, "--out", str(tmp_path / "table.safetensors"), *options])


def table(tmp_path):
    return dict(FeatureTable.load(tmp_path / "table.safetensors"))


def signalled(units, number):
    """A sweep's run() that gets a signal in the unit after `units`, and a list of units done."""
    whole = DistributionSweep.run
    seen = []

    def run(self):
        for done in whole(self):
            seen.append(done)
            if done == units + 1:
                os.kill(os.getpid(), number)
            yield done

    return run, seen
