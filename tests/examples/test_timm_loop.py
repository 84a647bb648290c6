"""The loop like timm's equals a plain loop and resumes; with timm's factories where it is there."""

import timm_loop
import torch
from _digits import noisy_digits
from comparison import assert_bitwise
from plain_loop import digit_batches, order_of_epoch, plain_loop

import mts_fast


def test_training_equals_a_plain_loop(monkeypatch):
    monkeypatch.setattr(timm_loop, "EPOCHS", 2)
    step, losses = timm_loop.run(2)
    torch.manual_seed(0)
    model = timm_loop.create_model("vit_tiny_patch16_224", num_classes=10, **timm_loop.VIT)
    optimizer = timm_loop.create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    updates = 2 * timm_loop.UPDATES
    schedule, _ = timm_loop.create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=2,
        updates_per_epoch=timm_loop.UPDATES,
        step_on_epochs=False,
    )
    selector = mts_fast.Selector(num_features=4, num_classes=10)
    parts = (model, optimizer, selector, torch.optim.AdamW(selector.parameters(), lr=1e-3))
    orders = [order_of_epoch(1200, epoch) for epoch in range(2)]
    batches = [
        {k: v.view(-1, 1, 8, 8) if k.endswith("inputs") else v for k, v in batch.items()}
        for batch in digit_batches(noisy_digits(), orders, timm_loop.BATCH)
    ]
    expected, plain = plain_loop(parts, batches, after_step=lambda k: schedule.step_update(k + 1))
    assert len(expected) == updates == step.steps
    half = timm_loop.UPDATES
    means = [sum(part) / half for part in (expected[:half], expected[half:])]
    # the meter adds losses times batch sizes, in another order of rounding
    assert all(abs(a - b) < 1e-12 for a, b in zip(losses, means, strict=True))
    assert_bitwise(step.state_dict(), plain.state_dict())


def test_a_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_loop, "EPOCHS", 3)
    whole, losses = timm_loop.run(3)
    _, first = timm_loop.run(1, tmp_path / "last.pth.tar")
    resumed, second = timm_loop.run(3, tmp_path / "last.pth.tar")
    assert first + second == losses
    assert_bitwise(resumed.state_dict(), whole.state_dict())
