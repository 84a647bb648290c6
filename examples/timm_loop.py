"""
A loop like timm's train.py
===========================

The structure of timm's training script: factories of model, optimizer and schedule,
``train_one_epoch`` with an ``AverageMeter``, ``step_update`` in an epoch and ``step`` after it. A
step of mts_fast takes the place of forward, loss, ``loss_scaler`` and ``optimizer.step()``.

timm needs torchvision, which this project does not install. Without timm the small stand-ins below
are used: the loop is the same, and timm's functions are not exercised. It was run with timm 1.0.31
once, with a stub in torchvision's place. With timm, the optimizers that it takes from torch have
update rules (``opt="sgd"``, ``"momentum"``, ``"adam"``, ``"adamw"``); for timm's own classes
register one. Leave out Mixup and CutMix, whose samples have no label and weight of their own,
``--grad-accum-steps`` (take ``micro_batch``) and ``--clip-grad`` (take ``max_grad_norm``). Several
processes have run on CPUs, without timm: ``CHECKPOINT=FOLDER torchrun --standalone
--nproc-per-node=2 timm_loop.py``.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from _digits import noisy_digits
from torch import nn

import mts_fast

try:
    from timm import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter
except ImportError:

    def create_model(name: str, **options: Any) -> nn.Module:
        """A stand-in for timm's: a small network, whatever the name."""
        layers = (nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 10))
        return nn.Sequential(*layers)

    def create_optimizer_v2(model: nn.Module, opt: str, lr: float, weight_decay: float) -> Any:
        """A stand-in for timm's: AdamW, without decay on vectors."""
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)

    class Linear:
        """A stand-in for timm's schedulers: down to 0 by the number of updates."""

        def __init__(self, optimizer: torch.optim.Optimizer, updates: int) -> None:
            self.optimizer, self.updates = optimizer, updates
            self.base = [group["lr"] for group in optimizer.param_groups]

        def step(self, epoch: int, metric: float | None = None) -> None:
            """Nothing: this schedule counts updates."""

        def step_update(self, num_updates: int, metric: float | None = None) -> None:
            for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = lr * max(0.0, 1 - num_updates / self.updates)

    def create_scheduler_v2(optimizer, sched, num_epochs, updates_per_epoch, step_on_epochs):
        """A stand-in for timm's, with as many of its arguments as are used here."""
        return Linear(optimizer, num_epochs * updates_per_epoch), num_epochs

    class AverageMeter:
        """A stand-in for timm's."""

        sum, count, avg = 0.0, 0, 0.0

        def update(self, val: float, n: int = 1) -> None:
            self.sum, self.count = self.sum + val * n, self.count + n
            self.avg = self.sum / self.count


RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
EPOCHS, UPDATES, BATCH = int(os.environ.get("STEPS", "4")), 5, 240
VIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}


def train_one_epoch(epoch: int, step: mts_fast.MTSStep, digits: Any, scheduler: Any) -> float:
    """timm's loop over an epoch. The epoch's order follows from its number."""
    losses_m, lr = AverageMeter(), step.optimizer.param_groups[0]
    step.model.train()
    images, labels = (digits.train[0].view(-1, 1, 8, 8), digits.train[1])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for update, batch in enumerate(order.split(BATCH)):
        i = batch.tensor_split(RANKS)[RANK]
        result = step(
            images[i],
            labels[i],
            is_synthetic=digits.is_synthetic[i],
            val_inputs=digits.validation[0].view(-1, 1, 8, 8).tensor_split(RANKS)[RANK],
            val_labels=digits.validation[1].tensor_split(RANKS)[RANK],
        )
        losses_m.update(result.loss.item(), len(batch))
        scheduler.step_update(num_updates=epoch * UPDATES + update + 1, metric=losses_m.avg)
    if RANK == 0:
        print(f"Train: {epoch}  Loss: {losses_m.avg:.5f}  LR: {lr['lr']:.2e}")
    return losses_m.avg


def run(epochs: int, file: Path | None = None) -> tuple[mts_fast.MTSStep, list[float]]:
    """timm's main: train until an epoch, from `file` where it is there, and save to it."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=EPOCHS,
        updates_per_epoch=UPDATES,
        step_on_epochs=False,
    )
    selector = mts_fast.Selector(num_features=4, num_classes=10)
    selector_optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-3)
    step = mts_fast.MTSStep(model, optimizer, selector, selector_optimizer)
    start = 0
    if file is not None and file.exists():
        saved = torch.load(file)
        start = saved["epoch"]
        step.load_state_dict(saved["step"])
        scheduler.step_update(start * UPDATES)
    losses, digits = [], noisy_digits()
    for epoch in range(start, epochs):
        losses.append(train_one_epoch(epoch, step, digits, scheduler))
        scheduler.step(epoch + 1, losses[-1])
    if file is not None and RANK == 0:
        torch.save({"epoch": epochs, "step": step.state_dict()}, file)
    if RANKS > 1:
        torch.distributed.barrier()
    return step, losses


if __name__ == "__main__":
    if RANKS > 1:  # on GPUs "nccl", after torch.cuda.set_device
        torch.distributed.init_process_group("gloo")
    # the same one for all processes
    file = Path(os.environ.get("CHECKPOINT") or tempfile.mkdtemp()) / "last.pth.tar"
    whole, losses = run(EPOCHS)
    _, first = run(EPOCHS // 2, file)
    resumed, second = run(EPOCHS, file)
    assert first + second == losses, "a resumed run has the same losses, bit for bit"
    print(f"{resumed.steps} steps; resumed from half of them: the same losses")
    plt.plot(losses)
    plt.xlabel("epoch")
    plt.ylabel("weighted training loss")
    plt.show()
