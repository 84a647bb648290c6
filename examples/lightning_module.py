"""
A LightningModule
=================

Manual optimization with one step of mts_fast in ``training_step``. Epochs, logging and checkpoints
are the Trainer's, in float32 or with ``precision="bf16-mixed"``. Several processes have run on
CPUs: ``STRATEGY=ddp DEVICES=2 CHECKPOINT=FOLDER python lightning_module.py``, or by torchrun.
Lightning itself refuses ``gradient_clip_val`` and ``accumulate_grad_batches`` with manual
optimization: take ``max_grad_norm`` and ``micro_batch`` of MTSStep. Resumed from the end of an
epoch a run is bit-identical. Lightning saves no random generators, so that is true of models
without dropout, and not of a checkpoint within an epoch. Checked with lightning 2.6.
"""

import os
import tempfile
from typing import Any

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import mts_fast

try:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
except ImportError as error:
    raise SystemExit("this example needs lightning: pip install 'mts_fast[examples]'") from error

EPOCHS = int(os.environ.get("STEPS", "10"))


class MTSModule(lightning.LightningModule):
    """Trains on batches {"pool": (inputs, labels, is_synthetic), "clean": (inputs, labels)}.

    options: those of MTSStep.
    """

    def __init__(self, model: torch.nn.Module, selector: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.selector, self.options = model, selector, options
        self.resumed: dict[str, Any] | None = None

    def configure_optimizers(self):
        """Both optimizers, so that Lightning keeps them in its checkpoints, and a schedule."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        selector_optimizer = torch.optim.AdamW(self.selector.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer, selector_optimizer], [schedule]

    def on_train_start(self) -> None:
        """Builds the step. Modules and optimizers are on their device, and restored, by now."""
        optimizer, selector_optimizer = self.optimizers(use_pl_optimizer=False)
        parts = (self.model, optimizer, self.selector, selector_optimizer)
        self.mts = mts_fast.MTSStep(*parts, **self.options)
        if self.resumed is not None:
            self.mts.load_state_dict({**self.mts.state_dict(), **self.resumed})
            self.resumed = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """One step. `progress` is what trainer.global_step reads, and with it max_steps, loggers
        and ModelCheckpoint; it counts the steps of Lightning's own optimizer wrapper alone."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        inputs, labels, is_synthetic = batch["pool"]
        val_inputs, val_labels = batch["clean"]
        progress.increment_ready()
        result = self.mts(
            inputs,
            labels,
            is_synthetic=is_synthetic,
            val_inputs=val_inputs,
            val_labels=val_labels,
        )
        progress.increment_completed()
        self.log("loss", result.loss, prog_bar=True)
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()
        return result.loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the step's state but for what Lightning has saved: modules and optimizers."""
        saved = ("model", "optimizer", "selector", "selector_optimizer")
        checkpoint["mts"] = {k: v for k, v in self.mts.state_dict().items() if k not in saved}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state for `on_train_start`: here there are no optimizers yet."""
        self.resumed = checkpoint["mts"]


def loaders(rank: int = 0, ranks: int = 1) -> dict[str, DataLoader]:
    """A process's part of 256 samples of the pool, and of the clean digits. The order of an epoch
    depends on its number alone: Lightning saves no generators, but calls `set_epoch`."""
    digits = noisy_digits()
    pool = TensorDataset(*digits.train, digits.is_synthetic)
    sampler = DistributedSampler(pool, num_replicas=ranks, rank=rank, seed=0)
    clean = TensorDataset(*(t.tensor_split(ranks)[rank] for t in digits.validation))
    return {
        "pool": DataLoader(pool, 256 // ranks, sampler=sampler, drop_last=True),
        "clean": DataLoader(clean, len(clean), sampler=SequentialSampler(clean)),
    }


def fit(epochs: int, folder: str, resume: str | None = None) -> tuple[MTSModule, ModelCheckpoint]:
    """Train for some epochs in all, and save the last one."""
    torch.manual_seed(0)
    module = MTSModule(classifier(), mts_fast.Selector(num_features=4, num_classes=10))
    checkpoint = ModelCheckpoint(folder)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        strategy=os.environ.get("STRATEGY", "auto"),
        devices=int(os.environ.get("DEVICES", "1")),
        use_distributed_sampler=False,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loaders(trainer.global_rank, trainer.world_size), ckpt_path=resume)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.5f}")
    return module, checkpoint


if __name__ == "__main__":
    folder = os.environ.get("CHECKPOINT") or tempfile.mkdtemp()  # the same one for all processes
    whole, _ = fit(EPOCHS, folder)
    _, half = fit(EPOCHS // 2, folder)
    resumed, _ = fit(EPOCHS, folder, half.best_model_path)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), "a resumed run ends with the same parameters, bit for bit"
    digits = noisy_digits()
    weights = resumed.mts.weights(
        *digits.train, is_synthetic=digits.is_synthetic, val_inputs=digits.validation[0]
    )
    plt.hist([weights[~digits.wrong], weights[digits.wrong]], 30, label=["right", "wrong"])
    plt.legend(title="label")
    plt.show()
