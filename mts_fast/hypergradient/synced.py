"""SyncBatchNorm: statistics of the samples of all ranks, exchanged within forward and backward."""

from __future__ import annotations

import torch
from torch import nn


def active_sync_batch_norms(model: nn.Module) -> dict[str, nn.SyncBatchNorm]:
    """Those in train mode where torch.distributed is initialised, by path; torch runs them on GPUs
    alone, even where the group is of one rank."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return {}
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.SyncBatchNorm) and module.training
    }


def exchanging_batch_norms(model: nn.Module) -> dict[str, nn.SyncBatchNorm]:
    """Those whose group has several ranks."""
    size = torch.distributed.get_world_size
    active = active_sync_batch_norms(model)
    return {path: m for path, m in active.items() if size(m.process_group) > 1}


def synced_reasons(model: nn.Module, derivative: str) -> list[str]:
    """Why an engine cannot serve that needs more than a first derivative by a backward: torch's
    autograd function of SyncBatchNorm has no other."""
    return [
        f"{path or 'the model'}: SyncBatchNorm in train mode over several ranks has no {derivative}"
        for path in exchanging_batch_norms(model)
    ]
