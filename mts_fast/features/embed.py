"""Embeddings of a pool by any torch model, in memory or straight into a file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from mts_fast._check import describe, fail
from mts_fast._files import replaced_file, writing
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.features.penultimate import PenultimateFeatures

OP = "embed"
PENULTIMATE = "penultimate"


def embed(
    model: nn.Module | str,
    loader: Iterable[Any],
    *,
    layer: str | None = None,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Embeddings of everything in a loader, by one pass of a model in eval mode.

    Args:
        model: a module, or a pretrained one by name: "timm:NAME" (its pooled features) or
            "torchvision:NAME" (what goes into its classifier), where those are installed.
        loader: batches in a fixed order: tensors [B, ...], or sequences whose first is such.
        layer: None takes the model's output; "penultimate" the input of its last linear layer; a
            module path the input of that module. Outputs [B, ..., D] are averaged over the axes
            between, [B, D, H, W] over H and W.
        device: where to run; by default where the model is.
        out: a .npy file to write row by row, so that memory does not grow with the pool. It needs
            a loader with a dataset of known length, and replaces an old file once complete.

    Returns:
        [N, D] float32 (or float64, of such a model), on the CPU; with `out`, memory-mapped.

    Raises:
        ValueError, TypeError: a loader that shuffles (the rows would not fit the labels) or is
            empty, batches or outputs of another kind, an unknown layer or name.
        ModuleNotFoundError: a name whose package is not installed.
        OSError: `out` cannot be written; an old file is unchanged.

    Notes:
        Modes, buffers and random generators are left as they were; the model is moved to `device`.

    Example:
        >>> import torch, mts_fast
        >>> images = torch.utils.data.DataLoader(torch.randn(10, 3, 8, 8), batch_size=4)
        >>> encoder = torch.nn.Conv2d(3, 6, 3)
        >>> mts_fast.features.embed(encoder, images).shape
        torch.Size([10, 6])
    """
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        fail(ValueError, OP, "loader", "in a fixed order", "shuffle=True", "pass shuffle=False")
    if isinstance(model, str):
        model, layer = _by_name(model, layer)
    if device is not None:
        model = model.to(device)
    run = _Embedder(model, layer)
    with training_mode(model, False), preserved_buffers(model), preserved_rng(model):
        if out is not None:
            return _to_file(run, loader, out)
        parts = [run(batch) for batch in loader]
    if not parts:
        fail(ValueError, OP, "loader", "non-empty", "no batch")
    return torch.cat(parts)


class _Embedder:
    """Batch -> its embeddings [B, D] on the CPU."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        first = next((t for t in (*model.parameters(), *model.buffers())), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.model = model
        self.features = None
        if layer is not None:
            path = None if layer == PENULTIMATE else layer
            self.features = PenultimateFeatures(model, path, op=OP, argument="layer")

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(inputs, Tensor):
            expected = "batches of tensors, or of sequences that begin with one"
            fail(TypeError, OP, "loader", expected, describe(batch), "map it to its inputs")
        with ExitStack() as stack:
            if self.features is not None:
                stack.enter_context(self.features.capture())
            output = self.model(inputs.to(self.device))
            if self.features is not None:
                output = self.features.taken()
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim < 2:
            hint = "name a layer whose input holds the embeddings"
            fail(TypeError, OP, "the model's output", "[B, ..., D] numbers", describe(output), hint)
        if output.ndim == 4:
            output = output.flatten(2).mean(2)
        elif output.ndim > 2:
            output = output.flatten(1, -2).mean(1)
        if len(output) != len(inputs):
            fail(ValueError, OP, "the model's output", f"of length {len(inputs)}", len(output))
        return output.to("cpu", output.dtype if output.dtype == torch.float64 else torch.float32)


def _to_file(
    run: Callable[[Any], Tensor], loader: Iterable[Any], out: str | os.PathLike[str]
) -> Tensor:
    """Write a .npy file of all embeddings and map it."""
    if not str(out).endswith(".npy"):
        fail(ValueError, OP, "out", "a .npy file", repr(str(out)))
    try:
        size = len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        hint = "pass a DataLoader of a sized dataset, or leave out out="
        fail(ValueError, OP, "loader", "of known length", describe(loader), hint)
    width, done = None, 0
    with replaced_file(OP, out) as part, part.open("wb") as file:
        for batch in loader:
            rows = run(batch).numpy()
            with writing(OP, out):
                if width is None:
                    width = rows.shape[1]
                    header = np.lib.format.header_data_from_array_1_0(rows)
                    header["shape"] = (size, width)
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(rows.tobytes())
            done += len(rows)
        if done != size or not done:
            fail(ValueError, OP, "loader", f"of {size} samples, as its dataset", done)
        with writing(OP, out):
            file.flush()
    # copy-on-write, as torch has no tensors that cannot be written to
    return torch.from_numpy(np.load(out, mmap_mode="c"))


def _by_name(name: str, layer: str | None) -> tuple[nn.Module, str | None]:
    """A pretrained model of timm or torchvision, and the layer that holds its embeddings."""
    package, _, model = name.partition(":")
    if package not in ("timm", "torchvision") or not model:
        fail(ValueError, OP, "model", "a module, 'timm:NAME' or 'torchvision:NAME'", repr(name))
    try:
        found = importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision of another torch: RuntimeError
        hint = f"install a {package} that fits this torch, or pass a module"
        message = f"{OP}: model must be of an installed package, got {name!r} ({error}); {hint}"
        raise ModuleNotFoundError(message) from error
    if package == "timm":
        return found.create_model(model, pretrained=True, num_classes=0), layer
    return found.models.get_model(model, weights="DEFAULT"), layer or PENULTIMATE
