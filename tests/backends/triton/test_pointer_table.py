"""Tables of pointers: made column by column where all parameters are alike, else row by row."""

import pytest
import torch

from mts_fast.backends.triton.kernels import pointer_table as tables
from mts_fast.backends.triton.kernels.pointer_table import pointer_table, program_map, rows_of

MISSING = [None, None, None]


def columns(*, dtype=torch.float32, shift=0, empty=False):
    sizes = (0 if empty else 3, 17, 5000)
    parameters = [torch.randn(n + shift)[shift:] for n in sizes]
    return [parameters, [torch.randn_like(p) for p in parameters], None, MISSING, [
        torch.zeros_like(p, dtype=dtype) for p in parameters
    ]]  # fmt: skip


def table_of(rows):
    return pointer_table(rows, [(float(i), 0.5) for i in rows.members])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_make_the_same_table(dtype, monkeypatch):
    made = columns(dtype=dtype)
    (fast,) = rows_of(made)
    monkeypatch.setattr(tables, "_uniform", lambda columns: None)
    (slow,) = rows_of(made)
    assert fast == slow
    table, scalars = table_of(fast)
    assert table[:, 0].tolist() == [3, 17, 5000]
    assert table[:, 1].tolist() == [p.data_ptr() for p in made[0]]
    assert table[:, 2].tolist() == [g.data_ptr() for g in made[1]]
    assert (table[:, 3:5] == 0).all() and table[:, 5].tolist() == [t.data_ptr() for t in made[4]]
    assert scalars.tolist() == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
    assert fast.kind.dtypes == (torch.float32,) * 4 + (dtype,) and fast.kind.aligned


def test_what_is_not_alike_is_split():
    """Empty tensors are left out; alignment and dtypes make launches of their own."""
    (rows,) = rows_of(columns(empty=True))
    assert rows.members == [1, 2] and rows.sizes == [17, 5000]
    assert [rows.kind.aligned for rows in rows_of(columns(shift=1))] == [False]
    mixed = columns()
    mixed[1][1] = mixed[1][1].double()
    first, second = rows_of(mixed)
    assert (first.members, second.members) == ([0, 2], [1])
    assert second.kind.dtypes[1] == torch.float64
    partly = columns()
    partly[3] = [None, partly[0][1], None]
    assert rows_of(partly)[0].pointers[3] == [0, partly[0][1].data_ptr(), 0]
    assert rows_of([[]]) == []


def test_programs_cover_every_entry():
    (rows,) = rows_of(columns())
    chunks = [-(-n // tables.CHUNK) for n in rows.sizes]
    expected = [[row, chunk] for row, count in enumerate(chunks) for chunk in range(count)]
    assert program_map(rows).tolist() == expected
