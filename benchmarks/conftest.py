"""Benchmarks that run out of time fail, one by one, so that the report of the others is written."""

import os
import time

import pytest

START = time.monotonic()
SECONDS = float(os.environ.get("MTS_FAST_BENCH_SECONDS", "inf"))


def pytest_runtest_setup(item):
    """pytest-benchmark writes nothing when pytest is interrupted, so nothing is."""
    if time.monotonic() - START > SECONDS:
        pytest.fail(f"not measured: {SECONDS:.0f} s are over; run it alone (-k)", pytrace=False)
