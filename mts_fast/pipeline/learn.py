"""MTS itself: the training in which the weights of the pool are learned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mts_fast.pipeline.batches import EpochBatches, seed_of
from mts_fast.pipeline.checkpoints import load_newest
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.data.findings import Findings
from mts_fast.pipeline.fit import Log, build_optimizer, end_of_epoch
from mts_fast.pipeline.inputs import EVALUATION_BATCH
from mts_fast.pipeline.pool import ONLINE_K, Pool, embeddings_of, online_of
from mts_fast.pipeline.team import ALONE, Team
from mts_fast.training import MTSStep, Selector, parameter_groups, warmup_cosine

# weights are averaged over that last share of the epochs: single selectors are noisy
AVERAGED_SHARE = 0.5


@dataclass(frozen=True)
class Learned:
    """The outcome: weights [M] of the pool, and the classifier and selector that made them."""

    weights: Tensor
    model: nn.Module
    selector: nn.Module
    val_features: Tensor  # [V, D], of the validation set under the final model
    online: Tensor  # [M, k + 1], of the pool against them


def learn_weights(
    model: nn.Module,
    columns: Tensor,
    pool: Pool,
    config: Config,
    *,
    stage: str,
    folder: Path,
    device: torch.device,
    findings: Findings,
    log: Log,
    class_weight: Tensor | None = None,
    team: Team = ALONE,
) -> Learned:
    """Train classifier and selector; resumed bit for bit from checkpoints in `folder`.

    Of several processes each has its part of every batch and of the validation batch; the step is
    that of all of them.

    Args:
        columns: offline features [M, F], standardised.
        class_weight: [C], factor of each class in the weights.
    """
    torch.manual_seed(seed_of(config.seed, "selector"))
    online_k = min(ONLINE_K, len(pool.val), config.val_batch_size)
    selector = Selector(columns.shape[1] + online_k + 1, pool.classes).to(device)
    batches = EpochBatches(pool.members, config.batch_size, config.seed)
    model.to(device).train()
    optimizer, schedule = build_optimizer(model, config, len(batches), config.epochs)
    groups = parameter_groups(selector, config.selector_weight_decay)
    selector_optimizer = torch.optim.AdamW(groups, lr=config.selector_lr)
    steps = config.epochs * len(batches)
    warmup = min(config.selector_warmup_epochs * len(batches), steps - 1)
    step = MTSStep(
        model,
        optimizer,
        selector,
        selector_optimizer,
        engine=config.engine,
        compute=config.compute,
        online_k=online_k,
        hypergradient_lr=config.hypergradient_lr,
        selector_every=config.selector_every,
        warmup_steps=warmup,
        micro_batch=config.micro_batch,
        class_weight=class_weight,
        selector_scheduler=warmup_cosine(selector_optimizer, warmup, steps + 1),
        process_group="auto" if team.size > 1 else None,
    )
    places = pool.places()
    columns, is_synthetic = columns.to(device), pool.is_synthetic.to(device)
    start, total = 0, torch.zeros(len(pool.members), dtype=torch.float64)
    averaged = 0
    newest = team.led(lambda: load_newest(folder, findings))
    if newest is not None:
        start, state = newest
        step.load_state_dict(state["step"])
        schedule.load_state_dict(state["schedule"])
        total, averaged = state["total"], state["averaged"]
    for epoch in range(start, config.epochs):
        torch.manual_seed(team.seed(seed_of(config.seed, "mts", epoch)))
        began = time.perf_counter()
        validation = _validation_batches(pool, config, epoch, device, team)
        loss = 0.0
        for batch in batches.epoch(epoch):
            indices = team.part(batch)
            i = places[indices].to(device)
            result = step(
                pool.inputs.training_batch(indices, device, epoch),
                pool.labels[indices].to(device),
                features=columns[i],
                is_synthetic=is_synthetic[i],
                **validation(),
            )
            schedule.step()
            if len(indices):
                loss += float(result.losses.mean()) * len(indices)
        if epoch + 1 > config.epochs * (1 - AVERAGED_SHARE):
            total += _weigh(step, columns, pool, device, team).double()
            averaged += 1
        loss = team.total(loss) / len(pool.members)
        team.copy_buffers(model)
        record = {"stage": stage, "epoch": epoch + 1, "loss": loss}
        statistics = result.statistics.read()
        seconds = time.perf_counter() - began
        speed = len(pool.members) / seconds
        record |= {**statistics, "seconds": seconds, "samples_per_second": speed}
        parts = {"step": step.state_dict, "schedule": schedule.state_dict}
        state = {"total": total, "averaged": averaged}
        arguments = (record, parts, config.epochs, config, folder, log)
        team.alone(partial(end_of_epoch, *arguments, **state))
    val = pool.val[:EVALUATION_BATCH]
    val_features = embeddings_of(model, pool.inputs, val, device, team)
    embeddings = embeddings_of(model, pool.inputs, pool.members, device, team)
    online = online_of(embeddings, val_features)
    weights = (total / averaged).float()
    return Learned(weights, model.eval(), selector.eval(), val_features, online)


def _validation_batches(
    pool: Pool, config: Config, epoch: int, device: torch.device, team: Team
) -> Callable[[], dict[str, Any]]:
    """This process's part of batches of the validation set without end; all of it in each where it
    is no larger."""
    count = 0

    def batch(chosen: Tensor) -> dict[str, Any]:
        members = team.part(chosen)
        return {
            "val_inputs": pool.inputs.batch(members, device),
            "val_labels": pool.labels[members].to(device),
        }

    if len(pool.val) <= config.val_batch_size:
        whole = batch(pool.val)
        return lambda: whole

    def next_batch() -> dict[str, Any]:
        nonlocal count
        generator = torch.Generator().manual_seed(seed_of(config.seed, "val", epoch, count))
        count += 1
        order = torch.randperm(len(pool.val), generator=generator)
        return batch(pool.val[order[: config.val_batch_size]])

    return next_batch


def _weigh(step: MTSStep, columns: Tensor, pool: Pool, device: torch.device, team: Team) -> Tensor:
    """Weights [M] of the pool under the current selector, on the CPU."""
    val = pool.inputs.batch(pool.val[:EVALUATION_BATCH], device)

    def compute(i: Tensor) -> list[Tensor]:
        indices = pool.members[i]
        weights = step.weights(
            pool.inputs.batch(indices, device),
            pool.labels[indices].to(device),
            features=columns[i.to(device)],
            is_synthetic=pool.is_synthetic[i].to(device),
            val_inputs=val,
        )
        return [weights.cpu()]

    places = torch.arange(len(pool.members))
    return team.mapped("weights", places, EVALUATION_BATCH, compute)[0]
