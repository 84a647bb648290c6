"""Processes for the tests of this folder."""

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four ranks, kept for all tests; groups of the first two and three are there, too."""
    pool = RankPool(4)
    yield pool
    pool.close()
