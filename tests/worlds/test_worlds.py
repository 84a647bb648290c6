"""MTSStep on random worlds: computed right, or refused by name with nothing changed.

`make worlds` searches further. What a failure prints is a world: save it and
`python scripts/search_worlds.py --replay FILE --shrink` runs it again.
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from rank_pool import SLOW

from worlds.runner import FAILURES, run
from worlds.sampling import RUN
from worlds.strategy import worlds
from worlds.world import World

PARTS = 15
# worlds that a search found wrong, one a line
ONCE_WRONG = (Path(__file__).parent / "once_wrong.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    "part", [*range(8), *(pytest.param(p, marks=SLOW) for p in range(8, PARTS))]
)
def test_worlds_are_computed_right_or_refused(part):
    @seed(part)
    @settings(
        max_examples=RUN,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        # a failure prints its world, which the script makes smaller: here that would take minutes
        phases=[Phase.generate],
    )
    @given(worlds())
    def search(world):
        report = run(world)
        assert report.verdict not in FAILURES, f"{report}\n{world.to_json()}"

    search()


@pytest.mark.parametrize("line", range(len(ONCE_WRONG)))
def test_worlds_that_were_once_wrong(line):
    report = run(World.from_json(ONCE_WRONG[line]))
    assert report.verdict not in FAILURES, str(report)
