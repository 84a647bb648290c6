"""Digits with wrong labels, the data of these examples."""

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("this example needs scikit-learn: pip install 'mts_fast[examples]'") from error


@dataclass
class Digits:
    """images [*, 64] and labels [*] of three parts; source and label errors of the first."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    is_synthetic: Tensor  # [N]
    wrong: Tensor  # [N], True where the label is wrong


def noisy_digits(share: float = 0.4, seed: int = 0) -> Digits:
    """200 real and 1000 'synthetic' samples, a share of these with wrong labels; 100 clean ones."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order].float() / 16, labels[order]
    is_synthetic = torch.arange(1200) >= 200
    wrong = is_synthetic & (torch.rand(1200, generator=generator) < share)
    shift = torch.randint(1, 10, (1200,), generator=generator)
    noisy = torch.where(wrong, (labels[:1200] + shift) % 10, labels[:1200])
    return Digits(
        (images[:1200], noisy),
        (images[1200:1300], labels[1200:1300]),
        (images[1300:], labels[1300:]),
        is_synthetic,
        wrong,
    )


def classifier() -> torch.nn.Module:
    """A small multi-layer perceptron."""
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
