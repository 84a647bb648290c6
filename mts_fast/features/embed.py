"""Embeddings of a pool by any torch model, in memory or straight into a file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mts_fast._check import check_bool, check_module, check_path, check_place, describe, fail
from mts_fast._files import replaced_file, writing
from mts_fast._isolation import preserved_buffers, preserved_rng, training_mode
from mts_fast.features.loaders import check_batch, check_loader, pool_size
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
    ordered: bool = False,
) -> Tensor:
    """Embeddings of everything in a loader, by one pass of a model in eval mode.

    Args:
        model: a module, or a pretrained one by name: "timm:NAME" (its pooled features) or
            "torchvision:NAME" (the input of its classifier), where those are installed.
        loader: batches in the order of the dataset: tensors [B, ...], or sequences that begin with
            one.
        layer: None takes the model's output; "penultimate" the input of its last linear layer; a
            module path the input of that module. Outputs [B, ..., D] are averaged over the axes
            between, [B, D, H, W] over H and W.
        device: where to run; by default where the model is.
        out: a .npy file to write row by row, so that memory does not grow with the pool. It needs
            a loader with a dataset of known length, and replaces an old file once complete.
        ordered: vouches for the order of a loader with a sampler of its own, which cannot be seen.

    Returns:
        [N, D] float32 (or float64, where the model computes in it), on the CPU; with `out`,
        memory-mapped.

    Raises:
        ValueError, TypeError: a loader that shuffles or may do so (the rows would not fit the
            labels), is empty or leaves samples of its dataset out; batches that begin with indices,
            batches or outputs of another kind or of differing widths; an unknown layer, name or
            device.
        ModuleNotFoundError: a name whose package is not installed.
        OSError: `out` cannot be written; an old file is unchanged.

    Notes:
        Modes, buffers and random generators are left as they were; the model is moved to `device`,
        and back where the call fails.

    Example:
        >>> import torch, mts_fast
        >>> images = torch.utils.data.DataLoader(torch.randn(10, 3, 8, 8), batch_size=4)
        >>> encoder = torch.nn.Conv2d(3, 6, 3)
        >>> mts_fast.features.embed(encoder, images).shape
        torch.Size([10, 6])
    """
    check_loader(OP, loader, ordered=check_bool(OP, "ordered", ordered))
    if out is not None:
        _check_out(out, loader)
    place = None if device is None else check_place(OP, "device", device)
    if isinstance(model, str):
        model, layer = _by_name(model, layer)
    check_module(OP, "model", model)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        hint = "load its weights first, with to_empty() and load_state_dict()"
        fail(ValueError, OP, "model", "on a device that holds values", "one on meta", hint)
    run = _Embedder(model, layer)
    with (
        _moved(model, place),
        training_mode(model, False),
        preserved_buffers(model),
        preserved_rng(model),
    ):
        return _in_memory(run, loader) if out is None else _to_file(run, loader, out)


def _check_out(out: str | os.PathLike[str], loader: Iterable[Any]) -> None:
    path = check_path(OP, "out", out)
    if path.suffix != ".npy":
        fail(ValueError, OP, "out", "a .npy file", repr(str(out)), "end its name in .npy")
    if pool_size(loader) is None:
        hint = "pass a DataLoader of a sized dataset, or leave out out="
        fail(ValueError, OP, "loader", "of known length", describe(loader), hint)


@contextmanager
def _moved(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The model on a device, and back where it was when something raises inside."""
    if device is None:
        yield
        return
    before = {n: t.device for n, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        model.to(device)
        yield
    except BaseException:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(before.get(name, tensor.device))
        raise


class _Embedder:
    """Batch -> its embeddings [B, D] on the CPU, all of one width and dtype."""

    def __init__(self, model: nn.Module, layer: str | None) -> None:
        self.model = model
        self.features = None
        self.like: tuple[int, torch.dtype] | None = None  # width and dtype of the first batch
        if layer is not None:
            path = None if layer == PENULTIMATE else layer
            self.features = PenultimateFeatures(model, path, op=OP, argument="layer")

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        inputs = check_batch(OP, batch)
        first = next((t for t in (*self.model.parameters(), *self.model.buffers())), inputs)
        with ExitStack() as stack:
            if self.features is not None:
                stack.enter_context(self.features.capture())
            output = self.model(inputs.to(first.device))
            if self.features is not None:
                output = self.features.taken()
        if (
            not isinstance(output, Tensor)
            or not output.is_floating_point()
            or output.ndim < 2
            or output.shape[-1] == 0
        ):
            hint = "name a layer whose input holds the embeddings"
            fail(TypeError, OP, "the model's output", "[B, ..., D] numbers", describe(output), hint)
        if output.ndim == 4:
            output = output.flatten(2).mean(2)
        elif output.ndim > 2:
            output = output.flatten(1, -2).mean(1)
        if len(output) != len(inputs):
            expected = f"of length {len(inputs)}"
            hint = "put samples first; a layer that is called twice cannot be taken"
            fail(ValueError, OP, "the model's output", expected, len(output), hint)
        rows = output.to("cpu", output.dtype if output.dtype == torch.float64 else torch.float32)
        width, dtype = self.like = self.like or (rows.shape[1], rows.dtype)
        if (rows.shape[1], rows.dtype) != (width, dtype):
            hint = "pad or crop the inputs to one size"
            expected = f"[B, {width}] {dtype} in every batch"
            fail(ValueError, OP, "the model's output", expected, describe(rows), hint)
        return rows


def _counted(run: Callable[[Any], Tensor], loader: Iterable[Any]) -> Iterator[Tensor]:
    """Embeddings [B, D] of one batch after the other, as many as the dataset has samples."""
    size, done = pool_size(loader), 0
    hint = "pass drop_last=False; embed a part of a dataset as a torch.utils.data.Subset"
    for batch in loader:
        rows = run(batch)
        done += len(rows)
        if size is not None and done > size:
            got = f"{done} or more"
            fail(ValueError, OP, "loader", f"of {size} samples, as its dataset", got, hint)
        yield rows
    if size is not None and done != size:
        fail(ValueError, OP, "loader", f"of {size} samples, as its dataset", done, hint)
    if not done:
        fail(ValueError, OP, "loader", "non-empty", "no batch", "a generator serves once")


def _in_memory(run: Callable[[Any], Tensor], loader: Iterable[Any]) -> Tensor:
    return torch.cat(list(_counted(run, loader)))


def _to_file(
    run: Callable[[Any], Tensor], loader: Iterable[Any], out: str | os.PathLike[str]
) -> Tensor:
    """Write a .npy file of all embeddings and map it."""
    begun = False
    with replaced_file(OP, out) as part, part.open("wb") as file:
        for tensor in _counted(run, loader):
            rows = tensor.numpy()
            with writing(OP, out):
                if not begun:
                    header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(rows))
                    header["shape"] = (pool_size(loader), rows.shape[1])
                    np.lib.format.write_array_header_1_0(file, header)
                    begun = True
                file.write(rows.tobytes())
        with writing(OP, out):
            file.flush()
    # copy-on-write, since torch has no read-only tensors
    return torch.from_numpy(np.load(out, mmap_mode="c"))


def _by_name(name: str, layer: str | None) -> tuple[nn.Module, str | None]:
    """A pretrained model of timm or torchvision, and the layer that holds its embeddings."""
    package, _, model = name.partition(":")
    if package not in ("timm", "torchvision") or not model:
        expected, hint = "a module, 'timm:NAME' or 'torchvision:NAME'", "say whose model it is"
        fail(ValueError, OP, "model", expected, repr(name), hint)
    try:
        library = importlib.import_module(package)
    except (ImportError, RuntimeError) as error:  # torchvision of another torch: RuntimeError
        hint = f"install a {package} that fits this torch, or pass a module"
        expected, got = "of an installed package", f"{name!r} ({error})"
        fail(ModuleNotFoundError, OP, "model", expected, got, hint)
    try:
        if package == "timm":
            return library.create_model(model, pretrained=True, num_classes=0), layer
        return library.models.get_model(model, weights="DEFAULT"), layer or PENULTIMATE
    except (RuntimeError, ValueError, KeyError) as error:  # the packages' errors for unknown names
        hint = f"{package}'s list_models() names them"
        fail(ValueError, OP, "model", f"one that {package} has", f"{name!r} ({error})", hint)
