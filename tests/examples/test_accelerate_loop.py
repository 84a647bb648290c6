"""The loop with accelerate equals a plain loop, and resumes bit for bit."""

import pytest
import torch
from _digits import noisy_digits
from comparison import assert_bitwise
from plain_loop import Steps, digit_batches, digit_parts, order_of_epoch, plain_loop

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from accelerate_loop import make_run, train


@pytest.fixture(autouse=True)
def one_accelerator_state():
    """Accelerators of a process share their precision, so each test starts without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_equals_a_plain_loop(precision):
    run = make_run(precision, max_grad_norm=0.5)
    steps = Steps(run.optimizer.optimizer)
    losses = train(run, range(2))
    parts = digit_parts()
    schedule = torch.optim.lr_scheduler.ExponentialLR(parts[1], 0.999)
    orders = [order_of_epoch(1200, epoch) for epoch in range(2)]
    expected, _ = plain_loop(
        parts,
        digit_batches(noisy_digits(), orders, 256),
        bf16=precision == "bf16",
        after_step=lambda _: schedule.step(),
        max_grad_norm=0.5,
    )
    assert losses == expected
    assert steps.count == run.step.steps == 8
    assert_bitwise(dict(run.step.model.state_dict()), dict(parts[0].state_dict()))
    assert_bitwise(dict(run.step.selector.state_dict()), dict(parts[2].state_dict()))


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole = make_run(online_momentum=0.9, warmup_steps=2)
    train(whole, range(2))
    whole.accelerator.save_state(tmp_path)
    rest = train(whole, range(2, 4))
    resumed = make_run(online_momentum=0.9, warmup_steps=2)
    resumed.accelerator.load_state(tmp_path)
    assert train(resumed, range(2, 4)) == rest
    assert_bitwise(resumed.step.state_dict(), whole.step.state_dict())
    assert_bitwise(resumed.scheduler.state_dict(), whole.scheduler.state_dict())
