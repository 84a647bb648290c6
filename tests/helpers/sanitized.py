"""A pytest plugin for `make test-asan`: refuses to run on anything but the sanitized build."""

from pathlib import Path

import pytest

from mts_fast.backends.cpp.extension import LIBRARY, extension


def pytest_configure(config):
    if not extension().available:
        raise pytest.UsageError(f"make test-asan: {extension().reason}")
    if b"__asan_report_load" not in Path(LIBRARY).read_bytes():
        raise pytest.UsageError(f"make test-asan: {LIBRARY} was built without the sanitizers")
