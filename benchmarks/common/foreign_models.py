"""Models that others wrote, built from their configurations: nothing is downloaded.

FOREIGN has one entry per kind: a function of a `Scale` that gives a `Foreign`, the model in train
mode with batches for it. They are made of transformers' classes, a few with peft's adapters.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

CLASSES = 4


@dataclass(frozen=True)
class Scale:
    """Sizes of a model and of its batches."""

    width: int = 32
    layers: int = 2
    heads: int = 4
    vocabulary: int = 96
    length: int = 16  # tokens
    pixels: int = 32
    frames: int = 64  # of a spectrogram; a wave has 32 samples for each

    @property
    def inner(self) -> int:
        return 4 * self.width


@dataclass
class Foreign:
    """A model, batches for it, and the loss of each sample if it is not the library's own."""

    model: nn.Module
    batch: Callable[[int], tuple[Any, Tensor]]  # B -> inputs, labels
    loss: Callable[[Any, Tensor], Tensor] | None = None


def next_token_loss(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, [B]."""
    logits = output.logits[:, :-1]
    terms = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return terms.view(len(labels), -1).mean(1)


def token_loss(output: Any, labels: Tensor) -> Tensor:
    """Mean cross-entropy over tokens, [B]."""
    terms = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="none")
    return terms.view(len(labels), -1).mean(1)


def of_transformers(name: str, task: str, **options: Any) -> nn.Module:
    """transformers' `name` + `task` from a configuration, without dropout, in train mode."""
    config_class = getattr(transformers, f"{name}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}{task}")(config_class(**options))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def tokens(scale: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """Token ids with a mask, and classes."""

    def batch(size: int) -> tuple[Any, Tensor]:
        ids = torch.randint(4, scale.vocabulary, (size, scale.length))
        mask = torch.ones_like(ids)
        mask[: size // 2, scale.length - 3 :] = 0
        return {"input_ids": ids, "attention_mask": mask}, torch.arange(size) % CLASSES

    return batch


def sequences(scale: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """Token ids, and the same as labels."""

    def batch(size: int) -> tuple[Any, Tensor]:
        ids = torch.randint(4, scale.vocabulary, (size, scale.length))
        return {"input_ids": ids}, ids

    return batch


def pairs(scale: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """Token ids of a source and of a target, and the target as labels."""

    def batch(size: int) -> tuple[Any, Tensor]:
        source = torch.randint(4, scale.vocabulary, (size, scale.length))
        target = torch.randint(4, scale.vocabulary, (size, scale.length // 2))
        return {"input_ids": source, "decoder_input_ids": target}, target

    return batch


def images(scale: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """RGB images and classes."""

    def batch(size: int) -> tuple[Any, Tensor]:
        pixels = torch.randn(size, 3, scale.pixels, scale.pixels)
        return {"pixel_values": pixels}, torch.arange(size) % CLASSES

    return batch


def waves(scale: Scale) -> Callable[[int], tuple[Any, Tensor]]:
    """Sound, 32 samples a frame, and classes."""

    def batch(size: int) -> tuple[Any, Tensor]:
        sound = torch.randn(size, 32 * scale.frames)
        return {"input_values": sound}, torch.arange(size) % CLASSES

    return batch


FOREIGN: dict[str, Callable[[Scale], Foreign]] = {}
# kind -> family, as in the table
FAMILY: dict[str, str] = {}


def enter_many(family: str, kinds: dict[str, Callable[[Scale], Foreign]]) -> None:
    """Enters functions into FOREIGN by name."""
    for name, make in kinds.items():
        FOREIGN[name] = make
        FAMILY[name] = family
