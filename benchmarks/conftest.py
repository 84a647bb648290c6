"""Fails benchmarks that would start after the time limit, so that the report is still written."""

import os
import time

import pytest

START = time.monotonic()
SECONDS = float(os.environ.get("MTS_FAST_BENCH_SECONDS", "inf"))


def pytest_runtest_setup(item):
    """Fails instead of interrupting: pytest-benchmark writes no report of an interrupted run."""
    if time.monotonic() - START > SECONDS:
        pytest.fail(f"not measured: {SECONDS:.0f} s are over; run it alone (-k)", pytrace=False)
