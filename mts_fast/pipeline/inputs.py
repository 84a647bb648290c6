"""Batches of a role's samples as a model takes them, pictures or texts, and its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mts_fast._check import fail
from mts_fast._launcher import place
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.pixels import augmented_batch, batch_of
from mts_fast.pipeline.team import ALONE, Team

# of one pass without gradients
EVALUATION_BATCH = 256


class Inputs(Protocol):
    """Samples of one role, by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, device: torch.device) -> Any:
        """Model inputs of these samples [B]."""
        ...

    def training_batch(self, indices: Tensor, device: torch.device, epoch: int) -> Any:
        """The same, augmented by numbers that depend on the seed, the epoch and the sample."""
        ...


class Images:
    """Pictures [N, size, size, 3] of bytes, in memory or in a file."""

    def __init__(self, pixels: np.ndarray, config: Config) -> None:
        self.pixels = pixels
        self.config = config

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Tensor, device: torch.device) -> Tensor:
        """[B, 3, size, size]."""
        return batch_of(self.pixels, indices, device)

    def training_batch(self, indices: Tensor, device: torch.device, epoch: int) -> Tensor:
        """[B, 3, size, size]."""
        c = self.config
        seed = (c.seed, epoch)
        return augmented_batch(
            self.pixels, indices, device, seed, crop=c.crop, jitter=c.jitter, flip=c.flip
        )


class Texts:
    """Token ids [N, T], padded, with the mask [N, T] of those that are no padding."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self.ids = ids
        self.mask = mask

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, T], T that of the longest."""
        mask = self.mask[indices.cpu()]
        longest = max([1, *mask.sum(1).tolist()])
        ids = self.ids[indices.cpu(), :longest]
        return {"input_ids": ids.to(device), "attention_mask": mask[:, :longest].to(device)}

    def training_batch(
        self, indices: Tensor, device: torch.device, epoch: int
    ) -> dict[str, Tensor]:
        """Texts are not augmented."""
        return self.batch(indices, device)


def device_of(config: Config) -> torch.device:
    """The device of a run; of several processes each has the GPU of its local number.

    Raises:
        ValueError: no device, or one that is not there; one GPU for several processes.
    """
    here = place()
    cards = torch.cuda.device_count()
    if here.ranks > 1 and cards and config.device != "cpu":
        return _card_of(config, here.local_rank, cards)
    there = ["cpu", *(f"cuda:{i}" for i in range(cards))]
    if config.device == "auto":
        return torch.device(there[-1] if len(there) == 1 else "cuda")
    if config.device not in (*there, *(["cuda"] if len(there) > 1 else [])):
        expected = f"auto or one of {', '.join(there)}"
        hint = "pass --set device=auto; `mts-fast doctor` shows what torch sees"
        fail(ValueError, "train", "device", expected, repr(config.device), hint)
    return torch.device(config.device)


def _card_of(config: Config, local_rank: int, cards: int) -> torch.device:
    """The GPU of one of several processes."""
    if config.device not in ("auto", "cuda"):
        hint = "leave it out, or pass --set device=cpu"
        fail(
            ValueError, "train", "device", "auto, cuda or cpu over ranks", repr(config.device), hint
        )
    if local_rank >= cards:
        hint = "pass a smaller --nproc-per-node to the launcher, or --set device=cpu"
        got = f"{cards}, and local rank {local_rank}"
        fail(ValueError, "train", "GPUs", "one for each rank of a host", got, hint)
    return torch.device("cuda", local_rank)


def run_model(model: nn.Module, inputs: Any) -> Tensor:
    """Logits [B, C] of a model that takes a tensor or keywords, and may return more."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def all_logits(
    model: nn.Module, inputs: Inputs, members: Tensor, device: torch.device, team: Team = ALONE
) -> Tensor:
    """Logits [M, C] of `members` [M] on the CPU, the model in eval mode, its mode put back."""

    def compute(indices: Tensor) -> list[Tensor]:
        return [run_model(model, inputs.batch(indices, device)).float().cpu()]

    mode = model.training
    model.eval()
    try:
        return team.mapped("logits", members, EVALUATION_BATCH, compute)[0]
    finally:
        model.train(mode)
