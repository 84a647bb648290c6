"""Plain training of a classifier, resumed bit for bit where it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mts_fast.distributed import Shard, Sums
from mts_fast.pipeline.batches import seed_of
from mts_fast.pipeline.checkpoints import load_newest, save_checkpoint
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data.findings import Findings
from mts_fast.pipeline.inputs import Inputs, run_model
from mts_fast.pipeline.team import ALONE, Team

# factor of the rate at a decay
DECAY = 0.1

# called with a record after every epoch
Log = Callable[[dict[str, Any]], None]
# called after every epoch: indices [M] in the order of training, which were classified rightly [M]
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
    team: Team = ALONE,
) -> nn.Module:
    """Train `model` to the end; checkpoints lie in `folder`, where an earlier one goes on.

    Random numbers (dropout) are seeded anew in every epoch, by seed, stage and epoch: an epoch is
    the same whether the run before it was interrupted or not. Of several processes each runs its
    part of every batch, with random numbers of its own; the step is that of the whole batch.

    Args:
        labels: [N], of `inputs`.
        class_weight: [C], factor of each class in the loss.
        watch: sees every epoch; what it gathers is not in checkpoints, so a stage that has one
            begins anew.
    """
    model.to(device).train()
    optimizer, schedule = build_optimizer(model, config, len(batches), epochs)
    start = 0
    newest = None if watch is not None else team.led(lambda: load_newest(folder, findings))
    if newest is not None:
        start, state = newest
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    watched = watch is not None
    trained = _Trained(model, inputs, labels, device, config.micro_batch, team, watched)
    for epoch in range(start, epochs):
        torch.manual_seed(team.seed(seed_of(config.seed, stage, epoch)))
        began, count = time.perf_counter(), 0
        trained.begin()
        for indices in batches.epoch(epoch):
            optimizer.zero_grad()
            trained.run(indices, _shares(labels[indices].to(device), class_weight), epoch)
            optimizer.step()
            schedule.step()
            count += len(indices)
        if watch is not None:
            watch(*trained.predictions())
        total = team.total(trained.total)
        team.copy_buffers(model)
        seconds = time.perf_counter() - began
        record = {"stage": stage, "epoch": epoch + 1, "loss": total / count, "seconds": seconds}
        record["samples_per_second"] = count / seconds
        parts: dict[str, Callable[[], Any]] = {"model": model.state_dict}
        parts |= {"optimizer": optimizer.state_dict, "schedule": schedule.state_dict}
        end = partial(log, record)
        if watch is None:
            end = partial(end_of_epoch, record, parts, epochs, config, folder, log)
        team.alone(end)
    return model.eval()


def end_of_epoch(
    record: dict[str, Any],
    parts: Mapping[str, Callable[[], Any]],
    epochs: int,
    config: Config,
    folder: Path,
    log: Log,
    **values: Any,
) -> None:
    """Log an epoch, and save a checkpoint of `values` and what `parts` return where one is due."""
    log(record)
    epoch = record["epoch"]
    if epoch % config.checkpoint_every == 0 and epoch < epochs:
        state = {**{name: make() for name, make in parts.items()}, **values}
        save_checkpoint(folder, epoch, state, config.keep_checkpoints)


class _Trained:
    """A model in training, this process's part of every batch, and what an epoch shows of it."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        labels: Tensor,
        device: torch.device,
        micro_batch: int | None,
        team: Team,
        watched: bool,
    ) -> None:
        self.model, self.inputs, self.labels, self.device = model, inputs, labels, device
        self.micro_batch = micro_batch
        self.team = team
        self.watched = watched
        self.ranks = team.gradients_of(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        """A new epoch."""
        self.total = 0.0  # of the losses here
        self.batches: list[Tensor] = []
        self.right: list[Tensor] = []

    def run(self, indices: Tensor, share: Tensor, epoch: int) -> None:
        """Leave the gradient of a whole batch in the parameters.

        Args:
            indices: [B], of all processes.
            share: [B], of each sample in the loss.
        """
        self.batches.append(indices)

        def gradients() -> Sums:
            self._backward(self.team.part(indices), self.team.part(share), len(indices), epoch)
            return [p.grad for p in self.parameters], []

        summed, _ = self.ranks.summed("gradients", self.parameters, 0, gradients)
        for parameter, gradient in zip(self.parameters, summed, strict=True):
            parameter.grad = gradient

    def _backward(self, indices: Tensor, share: Tensor, size: int, epoch: int) -> None:
        """Of the part here [b] of a batch of `size`; there may be none."""
        if not len(indices):
            return
        for part in indices.split(self.micro_batch or size):
            logits = run_model(self.model, self.inputs.training_batch(part, self.device, epoch))
            targets = self.labels[part].to(self.device)
            losses = F.cross_entropy(logits, targets, reduction="none")
            loss = (losses * share[: len(part)]).sum()
            share = share[len(part) :]
            loss.backward()
            self.total += float(loss.detach()) * size
            if self.watched:
                self.right.append((logits.detach().argmax(1) == targets).cpu())

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Indices [M] of the epoch, each process's after those of the one before it, and which
        were classified rightly [M] when their turn came."""
        parts = [batch.tensor_split(self.team.size) for batch in self.batches]
        of_ranks = [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]
        shard = Shard(tuple(map(len, of_ranks)), self.team.index)
        (right,) = self.team.ranks.rows(
            "predictions", shard, lambda: [torch.cat(self.right)] if self.right else []
        )
        return torch.cat(of_ranks), right


def _shares(targets: Tensor, class_weight: Tensor | None) -> Tensor:
    """[B]: of each sample in the loss of its batch, as torch's cross_entropy(weight=) has it."""
    if class_weight is None:
        return torch.full((len(targets),), 1 / len(targets), device=targets.device)
    weights = class_weight[targets]
    return weights / weights.sum()
