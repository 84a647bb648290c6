"""Processes for the tests of this folder."""

from pathlib import Path

import pytest
from rank_pool import RankPool


def pytest_collection_modifyitems(items):
    # one test process has the ranks (pytest -n 2 --dist loadgroup)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks():
    """Four ranks, kept for all tests; groups of the first two and three are there, too."""
    pool = RankPool(4)
    yield pool
    pool.close()
