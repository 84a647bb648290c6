"""TF32 by torch's switches, and tables of pointers inside of a CUDA graph's capture."""

import pytest
import torch

from mts_fast.backends.precision import allows_tf32, like_convolutions
from mts_fast.backends.triton.kernels.pointer_table import pointer_table, rows_of
from mts_fast.backends.triton.kernels.product import kind_of


@pytest.fixture(autouse=True)
def switches():
    """Puts them back."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision, convolutions.fp32_precision
    yield
    products.fp32_precision, convolutions.fp32_precision = before


def test_products_follow_both_switches():
    """After the new one is set, torch raises where the old one is read."""
    assert kind_of(torch.float32) == "float32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert kind_of(torch.float32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert kind_of(torch.float32) == "float32"
    torch.set_float32_matmul_precision("high")
    assert kind_of(torch.float32) == "tf32"
    assert (kind_of(torch.float64), kind_of(torch.bfloat16)) == ("float64", "half")


def test_convolutions_have_a_switch_of_their_own():
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with like_convolutions():
        assert allows_tf32()
    assert not allows_tf32()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with like_convolutions():
        assert not allows_tf32()
    assert allows_tf32()


def test_a_table_refuses_to_be_captured(monkeypatch):
    """Its pinned memory would be another's when the graph is replayed."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    (rows,) = rows_of([[torch.zeros(4)]])
    with pytest.raises(RuntimeError, match="must be outside of a CUDA graph's capture"):
        pointer_table(rows._replace(device=torch.device("cuda")))
