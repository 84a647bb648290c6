"""Checkpoints: bit for bit, whole or not there, broken ones named and older ones used."""

import math

import pytest
import torch

from mts_fast.pipeline.checkpoints import load_newest, load_state, save_checkpoint
from mts_fast.pipeline.data import Findings


def state_of(step):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "numbers": [1, 2.5, True, None, "text", math.inf, -0.0, 1e-320],
        "pairs": {(1, 2): "a tuple", 3: "a number", "tensor!": 4},
        "kinds": [
            torch.tensor(3, dtype=dtype) for dtype in (torch.bfloat16, torch.bool, torch.int8)
        ],
        "empty": torch.zeros(0, 4),
        "transposed": torch.rand(3, 4).T,
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    state = state_of(7)
    path = save_checkpoint(tmp_path, 7, state, keep=2)
    assert same(load_state(path), state)
    step, again = load_newest(tmp_path, Findings())
    assert step == 7 and same(again, state)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-00000020.safetensors",
        "checkpoint-00000100.safetensors",
    ]
    assert load_newest(tmp_path, Findings()) == (100, {"step": 100})


def test_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-last.safetensors").write_bytes(b"x")
    findings = Findings()
    assert load_newest(tmp_path, findings) is None and not findings.remarks


@pytest.mark.parametrize("damage", ["half", "empty", "one bit", "one bit of the text"])
def test_a_broken_one_is_named_and_an_older_one_used(damage, tmp_path):
    save_checkpoint(tmp_path, 1, {"x": torch.arange(9.0)}, keep=3)
    path = save_checkpoint(tmp_path, 2, {"x": torch.arange(9.0), "word": "whole"}, keep=3)
    content = bytearray(path.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "one bit":
        content[-3] ^= 1
    else:
        content[content.index(b"whole")] ^= 1
    path.write_bytes(content)
    findings = Findings()
    step, state = load_newest(tmp_path, findings)
    assert step == 1 and torch.equal(state["x"], torch.arange(9.0))
    (remark,) = findings.remarks
    assert str(path) in remark and "broken" in remark


def test_a_disk_that_fills_up_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"x": 1}, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mts_fast._files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, {"x": 2}, keep=1)
    monkeypatch.undo()
    assert load_newest(tmp_path, Findings()) == (1, {"x": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


def test_what_a_file_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="got function; convert it"):
        save_checkpoint(tmp_path, 1, {"x": full_of}, keep=1)
    assert not list(tmp_path.iterdir())


def full_of():
    """Something that is no state."""
