"""What an op was asked for, in exact form to be timed again, and as the key of a verdict."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mts_fast._check import fail
from mts_fast._files import replaced_file
from mts_fast.backends.precision import allows_tf32

OP = "record_requests"
SCHEMA = 1
# alignment that kernels make use of: bytes of one access of a thread, and entries of a tile's row
ACCESS_BYTES = 16
DIVISORS = (16, 8, 4)
# with more tensors than these a request is for a list of parameters, and its key has their sum
MOST_TENSORS = 5


class Shape(NamedTuple):
    """Size, memory layout and dtype of one tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    shift: int  # bytes from its first entry back to a multiple of ACCESS_BYTES
    dtype: str

    @classmethod
    def of(cls, t: Tensor) -> Shape:
        # a storage begins at a multiple of ACCESS_BYTES; fake tensors have no address to ask for
        shift = int(t.storage_offset()) * t.element_size() % ACCESS_BYTES
        return cls(tuple(t.shape), t.stride(), shift, str(t.dtype).removeprefix("torch."))

    def bytes(self) -> int:
        """Bytes of its entries."""
        return prod(self.size) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Request:
    """One call of an op, as `auto` sees it."""

    op: str
    variant: str  # an option that picks another kernel: the optimizers' states, statistics
    backward: bool  # whether a backward follows
    precision: str  # of float32 products, and autocast's dtype
    device: str  # type of the device
    tensors: tuple[Shape, ...]

    @classmethod
    def of(cls, op: str, variant: str, tensors: Sequence[Tensor]) -> Request:
        kind = tensors[0].device.type
        precision = "tf32" if allows_tf32() else "ieee"
        if torch.is_autocast_enabled(kind):
            precision += f", autocast {torch.get_autocast_dtype(kind)}".replace("torch.", "")
        backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return cls(op, variant, backward, precision, kind, tuple(map(Shape.of, tensors)))

    @functools.cached_property
    def key(self) -> str:
        """Requests of one key share a verdict: sizes by powers of two, divisibility and layout."""
        if len(self.tensors) > MOST_TENSORS:
            together = sum(shape.bytes() for shape in self.tensors)
            dtypes = sorted({shape.dtype for shape in self.tensors})
            layouts = sorted({_layout(shape) for shape in self.tensors})
            sizes = f"{_power(len(self.tensors))} tensors of {_power(together)} bytes"
            what = f"{sizes}; {'+'.join(dtypes)}; {'+'.join(layouts)}"
        else:
            what = "; ".join(map(_described, self.tensors))
        phase = "forward and backward" if self.backward else "forward"
        return " | ".join((self.op, self.variant, phase, self.precision, what))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Request:
        """A request as `asdict` gave it to JSON; TypeError or ValueError where it is none."""
        shapes = []
        for size, stride, shift, dtype in entry["tensors"]:
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                fail(ValueError, OP, "dtype", "one of torch's", repr(dtype), "record it anew")
            numbers = [*size, *stride, shift]
            if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
                expected, got = "whole numbers, one stride a size", (size, stride, shift)
                fail(ValueError, OP, "tensors", expected, got, "record them anew")
            shapes.append(Shape(tuple(size), tuple(stride), shift, dtype))
        texts = [entry[name] for name in ("op", "variant", "precision", "device")]
        backward = entry["backward"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(backward, bool):
            expected = "op, variant, precision and device as texts, backward as true or false"
            fail(TypeError, OP, "request", expected, dict(entry), "record it anew")
        op, variant, precision, device = texts
        return cls(op, variant, backward, precision, device, tuple(shapes))


def _power(n: int) -> str:
    """The power of two from n on."""
    return f"2^{max(n - 1, 0).bit_length()}"


def _described(shape: Shape) -> str:
    # the first axis counts samples, which no kernel wants to be divisible
    rows, *others = shape.size or (1,)
    axes = [_power(rows), *(f"{_power(n)}%{_divisor(n)}" for n in others)]
    return f"{shape.dtype}[{', '.join(axes)}] {_layout(shape)}"


def _divisor(n: int) -> int:
    return next((d for d in DIVISORS if n % d == 0), 1)


def _layout(shape: Shape) -> str:
    """Order of the axes in memory, gaps, and whether the first entry is aligned."""
    axes = [i for i, n in enumerate(shape.size) if n != 1]
    order = sorted(axes, key=lambda i: (-shape.stride[i], i))
    step = 1
    dense = True
    for i in reversed(order):
        dense = dense and shape.stride[i] == step
        step *= shape.size[i]
    words = ["rows" if order == axes else "axes " + "".join(map(str, order))]
    words += [] if dense else ["with gaps"]
    words += ["shifted"] if shape.shift else []
    return " ".join(words)


# requests of the `record_requests` in force: exact requests are kept, one of each
_recorded: dict[Request, None] | None = None


def recording() -> bool:
    """Whether requests are recorded."""
    return _recorded is not None


def note(request: Request) -> None:
    """Add a request to those recorded."""
    if _recorded is not None:
        _recorded[request] = None


@contextmanager
def record_requests(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write down what the ops are asked for inside the block, for `mts-fast tune --from PATH`.

    Args:
        path: a JSON file; an old one is replaced when the block ends without error.

    Raises:
        RuntimeError: inside of another `record_requests`.
        TypeError, OSError: no path, or one that cannot be written to.

    Notes:
        One or two calls of a step are enough. Calls under torch.compile are not seen: the compiler
        has its own code for them. What is recorded are sizes, strides and dtypes, no values.

    Example:
        >>> import tempfile, torch, mts_fast
        >>> folder = tempfile.mkdtemp()
        >>> with mts_fast.record_requests(f"{folder}/requests.json"):
        ...     loss = mts_fast.weighted_cross_entropy(
        ...         torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(2)
        ...     )
    """
    global _recorded
    if _recorded is not None:
        got = "a block inside of another"
        fail(RuntimeError, OP, "block", "the only one", got, "end the outer one first")
    _recorded = {}
    try:
        yield
        with replaced_file(OP, path) as part:
            entries = [asdict(request) for request in _recorded]
            part.write_text(json.dumps({"schema": SCHEMA, "requests": entries}) + "\n")
    finally:
        _recorded = None


def read_requests(op: str, arg: str, path: str | os.PathLike[str]) -> list[Request]:
    """The requests of a file that `record_requests` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is another file, or damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["schema"] != SCHEMA:
            fail(ValueError, op, arg, f"of schema {SCHEMA}", content["schema"], "record it anew")
        return [Request.from_json(entry) for entry in content["requests"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        got = f"{str(path)!r} ({type(error).__name__}: {error})"
        expected = "a file of mts_fast.record_requests"
        fail(ValueError, op, arg, expected, got, "record it anew")
