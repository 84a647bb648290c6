"""The LightningModule equals a plain loop, counts a step a batch, resumes bit for bit."""

import pytest
import torch
from _digits import noisy_digits
from comparison import assert_bitwise
from plain_loop import Steps, digit_batches, digit_parts, order_of_epoch, plain_loop

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_module import MTSModule, loaders

BATCHES = 4  # of an epoch: 1200 samples in batches of 256, the last one left out
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}


def make_module(**options):
    model, _, selector, _ = digit_parts()
    return MTSModule(model, selector, **options)


class Recorder(lightning.Callback):
    """The losses of a run, and how often its optimizer has stepped."""

    def __init__(self):
        self.losses, self.steps = [], None

    def on_train_batch_start(self, trainer, module, *_):
        self.steps = self.steps or Steps(module.mts.optimizer)

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def fit(module, folder, epochs=3, resume=None, callbacks=(), **options):
    callbacks = [ModelCheckpoint(folder, save_top_k=-1), *callbacks]
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET, **options)
    trainer.fit(module, loaders(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_equals_a_plain_loop(tmp_path, precision):
    module, recorder = make_module(warmup_steps=2, max_grad_norm=0.5), Recorder()
    trainer = fit(module, tmp_path, callbacks=[recorder], precision=precision)
    assert trainer.global_step == recorder.steps.count == module.mts.steps == 3 * BATCHES

    digits = noisy_digits()
    parts = digit_parts()
    schedule = torch.optim.lr_scheduler.ExponentialLR(parts[1], 0.99)
    orders = [order_of_epoch(1200, epoch) for epoch in range(3)]
    expected, _ = plain_loop(
        parts,
        digit_batches(digits, orders, 256),
        bf16=precision == "bf16-mixed",
        after_step=lambda k: schedule.step() if k % BATCHES == BATCHES - 1 else None,
        warmup_steps=2,
        max_grad_norm=0.5,
    )
    assert recorder.losses == expected
    assert_bitwise(dict(module.model.state_dict()), dict(parts[0].state_dict()))
    assert_bitwise(dict(module.selector.state_dict()), dict(parts[2].state_dict()))


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole, resumed = make_module(), make_module()
    trainer = fit(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"epoch=1-step={2 * BATCHES}.ckpt"
    again = fit(resumed, tmp_path / "resumed", resume=checkpoint)
    assert_bitwise(resumed.mts.state_dict(), whole.mts.state_dict())
    assert again.global_step == trainer.global_step == 3 * BATCHES
    saved = torch.load(checkpoint, weights_only=False)["mts"]
    assert saved["steps"] == 2 * BATCHES and "model" not in saved and "selector" not in saved


def test_max_steps_stops_the_run(tmp_path):
    module = make_module()
    fit(module, tmp_path, max_steps=6)
    assert module.mts.steps == 6


@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_lightning_refuses_what_manual_optimization_has_not(tmp_path, option):
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
        fit(make_module(), tmp_path, **option)
