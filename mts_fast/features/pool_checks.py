"""What the distribution features refuse, on one process and on several."""

from __future__ import annotations

import torch
from torch import Tensor

from mts_fast._check import check_choice, check_finite, check_positive_int, fail

OP = "distribution_features"
BAD_ROWS = "drop or repair these rows"


def check_sizes(size: int, k: int, neighbors: int, small_class: str) -> None:
    """Refuse options that do not fit a pool of that many samples."""
    for name, value in (("k", k), ("neighbors", neighbors)):
        check_positive_int(OP, name, value)
    check_choice(OP, "small_class", small_class, ("error", "pad"))
    if neighbors >= size:
        hint = "a sample is no neighbour of itself"
        fail(ValueError, OP, "neighbors", f"below the pool size {size}", neighbors, hint)
    if k > size:
        fail(ValueError, OP, "k", f"at most the pool size {size}", k, "no class is so large")


def check_distances(distance: Tensor, first: int = 0) -> None:
    """Refuse embeddings that are too large to be compared with a mean."""
    name = "the distance of embeddings to their class's mean"
    check_finite(OP, name, distance, "divide all of them by one number", first=first)


def check_class_sizes(labels: Tensor, synthetic: Tensor, names: Tensor, k: int) -> None:
    """Refuse a class with k samples of a source or fewer, as a sample is no neighbour of itself.
    `names` [C] are the classes as the caller numbers them."""
    hint = "pass small_class='pad' to accept this"
    for source, chosen in (("real", ~synthetic), ("synthetic", synthetic)):
        count = torch.bincount(labels[chosen], minlength=len(names))
        empty = names[count == 0].tolist()
        if empty:
            expected = f"such that every class has {source} samples"
            fail(ValueError, OP, "is_synthetic", expected, f"none in classes {empty[:5]}", hint)
        small = names[count <= k].tolist()
        if small:
            sizes = count[count <= k].tolist()
            expected = f"below the {source} samples of every class"
            fail(
                ValueError, OP, "k", expected, f"{k} with {sizes[:5]} in classes {small[:5]}", hint
            )
