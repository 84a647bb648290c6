"""Stratified parts of a labelled set, and random images of given classes."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast.demo.data.images import LabelledImages


def ranks_in_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """[N]: the place of each sample in a random order of its class."""
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty_like(order)
    for c in labels.unique().tolist():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    return rank


def random_of_classes(images: LabelledImages, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One random image [n, C, H, W] for each label [n].

    Raises:
        ValueError: a class without images.
    """
    picked = images.images.new_empty(len(labels), *images.images.shape[1:])
    for c in labels.unique().tolist():
        members = (labels == c).nonzero().flatten()
        candidates = (images.labels == c).nonzero().flatten()
        if len(candidates) == 0:
            hint = "take more images, so that some are left beside the real and validation ones"
            fail(ValueError, "demo", "images", "of every class", f"none of class {c}", hint)
        chosen = torch.randint(len(candidates), (len(members),), generator=generator)
        picked[members] = images.images[candidates[chosen]]
    return picked
