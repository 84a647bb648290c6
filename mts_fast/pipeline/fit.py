"""Plain training of a classifier, resumed bit for bit where it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mts_fast.pipeline.batches import seed_of
from mts_fast.pipeline.checkpoints import load_newest, save_checkpoint
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data.findings import Findings
from mts_fast.pipeline.inputs import Inputs, run_model

# factor of the rate at a decay
DECAY = 0.1

# called with a record after every epoch
Log = Callable[[dict[str, Any]], None]
# called after every step: indices [B], logits [B, C]
Watch = Callable[[Tensor, Tensor], None]


class Batches(Protocol):
    """Indices of the batches of an epoch."""

    def __len__(self) -> int: ...

    def epoch(self, number: int) -> Iterator[Tensor]: ...


def build_optimizer(
    model: nn.Module, config: Config, steps_per_epoch: int, epochs: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The classifier's optimizer, and its schedule by step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            weight_decay=config.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step / steps_per_epoch, config, epochs)
    )


def rate_factor(epoch: float, config: Config, epochs: int) -> float:
    """Factor of the learning rate at a time in epochs: warm-up, then the schedule."""
    warmup = config.warmup_epochs
    if epoch < warmup:
        return epoch / warmup if epoch else 1 / (100 * warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return DECAY ** sum(epoch >= decay for decay in config.decay_epochs)
    done = (epoch - warmup) / max(1e-9, epochs - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    batches: Batches,
    config: Config,
    *,
    stage: str,
    epochs: int,
    folder: Path,
    device: torch.device,
    findings: Findings,
    log: Log,
    class_weight: Tensor | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Train `model` to the end; checkpoints lie in `folder`, where an earlier one goes on.

    Random numbers (dropout) are seeded anew in every epoch, by seed, stage and epoch: an epoch is
    the same whether the run before it was interrupted or not.

    Args:
        labels: [N], of `inputs`.
        class_weight: [C], factor of each class in the loss.
        watch: sees every step; what it gathers is not in checkpoints, so a stage that has one
            begins anew.
    """
    model.to(device).train()
    optimizer, schedule = build_optimizer(model, config, len(batches), epochs)
    start = 0
    newest = None if watch is not None else load_newest(folder, findings)
    if newest is not None:
        start, state = newest
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for epoch in range(start, epochs):
        torch.manual_seed(seed_of(config.seed, stage, epoch))
        began, total, count = time.perf_counter(), 0.0, 0
        for indices in batches.epoch(epoch):
            optimizer.zero_grad()
            share = _shares(labels[indices].to(device), class_weight)
            for part in range(0, len(indices), config.micro_batch or len(indices)):
                chosen = slice(part, part + (config.micro_batch or len(indices)))
                members = indices[chosen]
                logits = run_model(model, inputs.training_batch(members, device, epoch))
                losses = F.cross_entropy(logits, labels[members].to(device), reduction="none")
                loss = (losses * share[chosen]).sum()
                loss.backward()
                total += float(loss.detach()) * len(indices)
                if watch is not None:
                    watch(members, logits.detach())
            optimizer.step()
            schedule.step()
            count += len(indices)
        seconds = time.perf_counter() - began
        record = {"stage": stage, "epoch": epoch + 1, "loss": total / count, "seconds": seconds}
        log({**record, "samples_per_second": count / seconds})
        if watch is None and (epoch + 1) % config.checkpoint_every == 0 and epoch + 1 < epochs:
            state = {
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            save_checkpoint(folder, epoch + 1, state, config.keep_checkpoints)
    return model.eval()


def _shares(targets: Tensor, class_weight: Tensor | None) -> Tensor:
    """[B]: of each sample in the loss of its batch, as torch's cross_entropy(weight=) has it."""
    if class_weight is None:
        return torch.full((len(targets),), 1 / len(targets), device=targets.device)
    weights = class_weight[targets]
    return weights / weights.sum()
