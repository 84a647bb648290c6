"""Fixtures of the tests of the Triton kernels: a skip without triton, and poisoned memory."""

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
    """Fills what torch.empty, empty_like and new_empty return with NaN."""

    def poison(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
