"""Engines and gradient scalers of a step that loads a state or was undone."""

import pytest
import torch
from small_steps import Base, batch, plain_model, step_of


def test_an_engine_that_is_named_is_not_overridden_by_a_state():
    other, step = step_of(plain_model(), engine="double_backward"), step_of(plain_model())
    other(**batch(0))
    for engine in ("ghost", "forward_mode"):
        named = step_of(plain_model(), engine=engine)
        named.load_state_dict(other.state_dict())
        assert named(**batch(1)).engine == engine
    step.load_state_dict(other.state_dict())
    assert step(**batch(1)).engine == "double_backward"


def test_a_scaler_is_usable_after_a_step_that_was_undone():
    class Refusing(Base):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) + h @ (self.b.weight.T @ torch.eye(3).double()).roll(1, 0)

    step = step_of(Refusing(), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    failures = [KeyError]

    def once(*_):
        if failures:
            raise failures.pop()

    step.optimizer.register_step_pre_hook(once)
    with pytest.raises(KeyError):
        step(**batch(0))
    for seed in range(3):
        assert not step(**batch(seed)).skipped
    state = step.state_dict()
    off = step_of(plain_model(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    off(**batch(0))
    fresh = step_of(plain_model())
    fresh.load_state_dict(off.state_dict())
    assert fresh.scaler is None and state["scaler"]["scale"] == 8.0
