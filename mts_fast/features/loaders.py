"""Which loaders give the samples of a pool in order, and what their batches hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, IterableDataset, SequentialSampler

from mts_fast._check import INTEGER_DTYPES, check_readable, describe, fail


def check_loader(op: str, loader: object, *, ordered: bool) -> None:
    """Refuse a loader whose order may not be its dataset's, unless the caller vouches for it with
    `ordered`. A loader without samplers counts as ordered."""
    if isinstance(loader, Tensor) or _is_map_style(loader):
        hint = "wrap it in torch.utils.data.DataLoader(..., batch_size=256)"
        fail(TypeError, op, "loader", "batches", f"single samples of {_name(loader)}", hint)
    if isinstance(loader, str | Mapping) or not isinstance(loader, Iterable):
        hint = "pass a DataLoader or a list of batches"
        fail(TypeError, op, "loader", "an iterable of batches", describe(loader), hint)
    if ordered:
        return
    why = _disorder(loader)
    if why:
        hint = (
            "pass shuffle=False and no sampler, or ordered=True if you know the order to be fixed"
        )
        fail(ValueError, op, "loader", "in a fixed order", why, hint)


def _is_map_style(loader: object) -> bool:
    return isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)


def _name(value: object) -> str:
    return type(value).__name__


def _disorder(loader: object) -> str:
    """Why a loader's order is not known to be its dataset's; empty where it is."""
    if isinstance(loader, Set):
        return f"a {_name(loader)}, which has none"
    workers = getattr(loader, "num_workers", 0)
    if workers and not getattr(loader, "in_order", True):
        return "in_order=False"
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        # several workers deliver their batches in turn
        return "an IterableDataset with several workers" if workers > 1 else ""
    sampler = getattr(loader, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(loader, "sampler", None)
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    # a sampler of another class may visit the samples in another order
    if sampler is None or type(sampler) is SequentialSampler:
        return ""
    return f"shuffle=True or a sampler of its own ({_name(sampler)})"


def pool_size(loader: object) -> int | None:
    """How many samples a loader's dataset has, where that is known."""
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        return None


def check_batch(op: str, batch: Any) -> Tensor:
    """The inputs [B, ...] in a batch: the batch itself, or its first element."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor):
        expected = "batches of tensors, or of sequences that begin with one"
        fail(TypeError, op, "loader", expected, describe(batch), "map it to its inputs")
    check_readable(op, "loader's batches", inputs)
    if inputs.ndim == 0 or len(inputs) == 0:
        hint = "samples come first"
        fail(ValueError, op, "loader's batches", "[B, ...] with B >= 1", describe(inputs), hint)
    if isinstance(batch, tuple | list) and _begins_with_indices(batch):
        got = f"{describe(inputs)}, as of indices, before a {_name(batch[1])}"
        hint = "leave the index out: (inputs, labels) for batch in loader"
        fail(TypeError, op, "loader's batches", "inputs first", got, hint)
    return inputs


def _begins_with_indices(batch: tuple[Any, ...] | list[Any]) -> bool:
    """Whether one integer per sample comes before possible inputs: a nest, or 2 or more axes."""
    first, *rest = batch
    if first.ndim != 1 or first.dtype not in INTEGER_DTYPES or not rest:
        return False
    return isinstance(rest[0], tuple | list | Mapping) or (
        isinstance(rest[0], Tensor) and rest[0].ndim > 1
    )
