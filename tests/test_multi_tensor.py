"""Lists of tensors in few launches: copies, writes, inner products."""

import pytest
import torch
from device_work import Launches

from mts_fast import _multi_tensor
from mts_fast._multi_tensor import (
    SavedValues,
    copies,
    inner_product,
    largest_entry,
    overwrite,
    parts,
)


def odd_tensors():
    """Tensors of every kind that a module may hold."""
    image = torch.randn(2, 3, 4, 5)
    return {
        "plain": torch.randn(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(5)),
        "no axes": torch.tensor(3.0),
        "counter": torch.tensor(7),
        "no entries": torch.zeros(0, 3),
        "channels last": image.to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "gaps": torch.randn(6, 4)[::2],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "bool": torch.rand(5) > 0.5,
        "half": torch.randn(3).half(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(3).to_sparse(),
    }


def test_copies_are_equal_and_apart():
    tensors = odd_tensors()
    for (name, t), c in zip(tensors.items(), copies(list(tensors.values())), strict=True):
        assert c.dtype == t.dtype and c.layout == t.layout and not c.requires_grad, name
        if t.layout is torch.strided and t.numel():
            assert c.untyped_storage().data_ptr() != t.untyped_storage().data_ptr(), name
            if name in ("channels last", "transposed"):
                assert c.stride() == t.stride(), name
        assert torch.equal(c.to_dense(), t.detach().to_dense()), name


def test_overwrite_writes_every_kind_without_moving_versions():
    tensors = {n: t for n, t in odd_tensors().items() if n != "expanded"}
    values = [torch.zeros_like(t) + 1 if t.layout is torch.strided else t for t in tensors.values()]
    values = [v.to(t.dtype) for v, t in zip(values, tensors.values(), strict=True)]
    versions = [t._version for t in tensors.values()]
    overwrite(list(tensors.values()), values)
    for (name, t), v in zip(tensors.items(), values, strict=True):
        assert torch.equal(t.detach().to_dense(), v.detach().to_dense()), name
    assert [t._version for t in tensors.values()] == versions


def test_values_of_another_dtype_are_converted():
    target = torch.zeros(3)
    overwrite([target], [torch.ones(3, dtype=torch.float64)])
    assert target.tolist() == [1.0, 1.0, 1.0]


def test_tensors_of_a_subclass_are_copied_one_by_one():
    class Marked(torch.Tensor):
        pass

    marked = torch.randn(3).as_subclass(Marked)
    (copy,) = copies([marked])
    assert torch.equal(copy, marked) and copy.data_ptr() != marked.data_ptr()


@pytest.mark.parametrize("names", [("plain", "parameter", "no axes", "no entries", "half"), None])
@pytest.mark.parametrize("chunk", [1, 10, 2**24])  # alone, in parts, all together
def test_saved_values_are_put_back(names, chunk, monkeypatch):
    """Those that may lie side by side, and every kind of tensor."""
    monkeypatch.setitem(_multi_tensor.CHUNK, "cpu", chunk)
    tensors = [t for n, t in odd_tensors().items() if n != "expanded" and n in (names or [n])]
    before = [t.detach().clone() for t in tensors]
    strides = [t.stride() for t in tensors if t.layout is torch.strided]
    versions = [t._version for t in tensors]
    saved = SavedValues(tensors)
    for t in tensors:
        t.data.zero_()
    for value, b in zip(saved.values(), before, strict=True):
        assert torch.equal(value.to_dense(), b.to_dense())
    for _ in range(2):  # a clean-up may be repeated
        saved.restore()
        for t, b in zip(tensors, before, strict=True):
            assert torch.equal(t.detach().to_dense(), b.to_dense())
        for t in tensors:
            t.data.zero_()
    assert [t.stride() for t in tensors if t.layout is torch.strided] == strides
    assert [t._version for t in tensors] == versions


def test_small_tensors_are_saved_in_one_launch():
    tensors = [torch.randn(3, 2) for _ in range(100)]
    with Launches() as launches:
        SavedValues(tensors)
    assert sum(launches.by_name.values()) == 1


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float64, torch.bfloat16]])
def test_largest_entry(dtypes):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (0,), (700, 700)]  # the last does not lie beside others
    tensors = [torch.randn(s, generator=g).to(d) for s in shapes for d in dtypes]
    tensors[0][1, 2] = -7.5
    assert float(largest_entry(tensors)) == 7.5
    tensors[-1][5, 5] = torch.inf
    assert float(largest_entry(tensors)) == torch.inf
    tensors[1].fill_(torch.nan)
    assert largest_entry(tensors).isnan()
    assert float(largest_entry([torch.zeros(0)])) == 0.0


@pytest.mark.parametrize("chunk", [1, 10, 2**24])  # alone, in parts, all together
def test_inner_product(chunk, monkeypatch):
    monkeypatch.setitem(_multi_tensor.CHUNK, "cpu", chunk)
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (7,), (0,), (2, 5), (11,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.bfloat16] * 2
    a, b = (
        [torch.randn(s, generator=g).to(d) for s, d in zip(shapes, dtypes, strict=False)]
        for _ in "ab"
    )
    truth = sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
    product = inner_product(a, b, torch.float64)
    assert product.dtype == torch.float64 and product.ndim == 0
    assert abs(product - truth) < 0.05  # bfloat16 products round; observed 0.006
    plain = [i for i, t in enumerate(a) if t.dtype is not torch.bfloat16]
    truth = sum((a[i].double() * b[i].double()).sum() for i in plain)
    product = inner_product([a[i] for i in plain], [b[i] for i in plain], torch.float64)
    assert abs(product - truth) < 1e-5


def test_parts(monkeypatch):
    monkeypatch.setitem(_multi_tensor.CHUNK, "cpu", 10)

    def of(*sizes):
        return parts([torch.zeros(size) for size in sizes])

    assert of() == []
    assert of(0) == [[0]]
    assert of(4, 6, 1, 20, 3, 0) == [[0, 1], [2], [3], [4, 5]]
