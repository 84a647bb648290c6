"""Fixtures shared by all tests: the device, and repeatable random numbers."""

import os
import signal

import pytest
import torch

# without a GPU the Triton kernels run in triton's interpreter; the variable must be set before they
# are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# what this machine's user has timed must not decide which kernels the tests run
os.environ["MTS_FAST_VERDICTS"] = "off"

from mts_fast import use_backend
from mts_fast.backends.registry import backend_reasons
from mts_fast.backends.verdicts import table


def pytest_configure(config):
    # a shell starts background jobs with SIGINT ignored; the tests of interruptions send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # several test processes share the cores: one thread each, so that they do not compete.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device():
    """Where tests run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same generators and leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of verdicts for the test, read anew."""
    monkeypatch.setenv("MTS_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MTS_FAST_VERDICTS", "cached")
    table.forget()
    yield tmp_path / "cache" / "verdicts"
    table.forget()


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    """Every backend that runs here, selected for the test."""
    why = backend_reasons(request.param)
    if why:
        pytest.skip("; ".join(why))
    with use_backend(request.param):
        yield request.param
