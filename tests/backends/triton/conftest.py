"""What the tests of the Triton kernels share: when they run, and poisoned memory."""

import pytest
import torch

from mts_fast.backends.triton.eligibility import triton_reasons


@pytest.fixture(autouse=True)
def needs_triton():
    """Without triton there is nothing to test; without a GPU its interpreter runs the kernels."""
    if triton_reasons():
        pytest.skip("; ".join(triton_reasons()))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out unwritten is full of NaN."""

    def poison(make):
        def made(*arguments, **options):
            found = make(*arguments, **options)
            return found.fill_(torch.nan) if found.is_floating_point() else found

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
