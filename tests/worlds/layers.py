"""Layers that keep the shape of what they are given: parts as users write them.

Each takes (x, context); x is [B, W], [B, W, L], [B, W, H, H] or a sequence [B, T, W] ([T, B, W]
where the world is time first).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from worlds.derived_layers import DERIVED_LAYERS
from worlds.layer import Context, Function, Layer, Wrapped, _trained
from worlds.traps import BatchCentred, Detached, Domain, Mixup, RunningCentre, TernaryLinear
from worlds.world import STEPS, WIDTH, Options


class Residual(Layer):
    """x + f(x)."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def run(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Checkpointed(Residual):
    """The same, with its activations made anew in the backward."""

    # the oracle switches it off: a reentrant one cannot be asked for gradients by autograd.grad
    enabled = True

    def __init__(self, reentrant: bool) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2))
        self.reentrant = reentrant

    def run(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return super().run(x)
        return x + checkpoint(self.inner, x, use_reentrant=self.reentrant)


class NumpyDropout(Layer):
    """A mask by numpy's global generator (SpecAugment)."""

    def run(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.from_numpy(np.random.random_sample(x.shape) < 0.7)
        return x * keep.to(x.device, x.dtype) / 0.7


class PythonDropout(Layer):
    """Whole samples' features dropped by Python's generator (stochastic depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.training:
            return x + self.inner(x)
        axis = context.batch_axis if x.ndim == 3 else 0
        keep = torch.tensor([random.random() < 0.7 for _ in range(x.shape[axis])], dtype=x.dtype)
        shape = [1] * x.ndim
        shape[axis] = -1
        return x + self.inner(x) * keep.to(x.device).view(shape)


class WritesItsInput(Layer):
    """Scales the very tensor that it is given."""

    def run(self, x: Tensor) -> Tensor:
        return x.div_(2.0)


class Branch(Layer):
    """A layer for synthetic samples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        assert context.synthetic is not None
        shape = [1] * x.ndim
        shape[context.batch_axis if x.ndim == 3 else 0] = -1
        return x + self.inner(x).tanh() * context.synthetic.to(x.dtype).view(shape)


class Experts(Layer):
    """Two linear layers, mixed by a gate of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        return x + sum(e(x) * share[..., [k]] for k, e in enumerate(self.experts))


class Unused(Layer):
    """A layer that no forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)

    def run(self, x: Tensor) -> Tensor:
        return x


class LowRank(Layer):
    """A frozen layer and a low-rank change of it (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, WIDTH) / 2)
        self.up = nn.Parameter(torch.randn(WIDTH, 2) / 2)

    def run(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class TiedPair(Layer):
    """One matrix, used once as it is and once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.decode = nn.Linear(WIDTH, WIDTH, bias=False)
        self.decode.weight = self.encode.weight

    def run(self, x: Tensor) -> Tensor:
        return x + self.decode(torch.tanh(self.encode(x)))


class Symmetric(nn.Module):
    """A parametrization: W + W^T."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


class Attention(Layer):
    """nn.MultiheadAttention, its layout the world's."""

    def __init__(self, time_first: bool, dropout: float, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, dropout=dropout, batch_first=not time_first
        )

    def run(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.weights)[0]


class CausalAttention(Layer):
    """One head by hand: a packed projection and scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = x.transpose(0, 1) if context.time_first else x
        q, k, v = self.project(y)[:, None].chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return x + (mixed.transpose(0, 1) if context.time_first else mixed)


class Recurrent(Layer):
    """GRU or LSTM, packed by the samples' lengths where asked for."""

    def __init__(self, kind: str, time_first: bool, packed: bool, bidirectional: bool) -> None:
        super().__init__()
        self.packed = packed
        cls = nn.GRU if kind == "gru" else nn.LSTM
        size = WIDTH // 2 if bidirectional else WIDTH
        self.rnn = cls(WIDTH, size, batch_first=not time_first, bidirectional=bidirectional)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        first = not context.time_first
        if not self.packed:
            return x + self.rnn(x)[0]
        assert context.lengths is not None
        packed = nn.utils.rnn.pack_padded_sequence(
            x, context.lengths.cpu(), batch_first=first, enforce_sorted=False
        )
        y, _ = nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=first, total_length=x.shape[1 if first else 0]
        )
        return x + y


class Positions(Layer):
    """A learned vector of each position."""

    def __init__(self, time_first: bool, by_index: bool) -> None:
        super().__init__()
        self.by_index = by_index
        if by_index:
            self.table = nn.Embedding(STEPS, WIDTH)
        else:
            shape = (STEPS, 1, WIDTH) if time_first else (1, STEPS, WIDTH)
            self.position = nn.Parameter(torch.randn(shape) / 2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not self.by_index:
            return x + self.position
        rows = self.table(torch.arange(STEPS, device=x.device))
        return x + (rows[:, None] if context.time_first else rows)


class ClassToken(Layer):
    """A learned first position; the last one makes room, so that the length stays."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        axis = 0 if context.time_first else 1
        shape = list(x.shape)
        shape[axis] = 1
        return torch.cat([self.token.expand(shape), x.narrow(axis, 0, x.shape[axis] - 1)], axis)


class OverTime(Layer):
    """A convolution along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.time_first:
            return x + self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


def _shape(source: str) -> tuple[int, ...]:
    """Of a parameter that meets channels elementwise."""
    return {"image": (WIDTH, 1, 1), "signal": (WIDTH, 1)}.get(source, (WIDTH,))


def _activation(o: Options) -> nn.Module:
    return {"gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU, "relu": nn.ReLU}[o["function"]]()


def _batch_norm(o: Options, source: str) -> nn.Module:
    cls = nn.BatchNorm2d if source == "image" else nn.BatchNorm1d
    return cls(WIDTH, momentum=None if o.get("cumulative") else 0.1)


class FrozenStatistics(Wrapped):
    """BatchNorm that stays in eval mode whatever the model's mode."""

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        self.module.eval()
        return self


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def build_layer(o: Options, source: str, time_first: bool) -> nn.Module:
    """The layer that the options name, for activations as `source` has them."""
    images = source == "image"
    conv = nn.Conv2d if images else nn.Conv1d
    transposed = nn.ConvTranspose2d if images else nn.ConvTranspose1d
    instance = nn.InstanceNorm2d if images else nn.InstanceNorm1d
    channels = _shape(source)
    makers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: Wrapped(nn.Linear(WIDTH, WIDTH, bias=o.get("bias", True))),
        "mlp": lambda: Residual(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        ),
        "activation": lambda: Wrapped(_activation(o)),
        "dropout": lambda: Wrapped(nn.Dropout(0.3)),
        "dropout_channels": lambda: Wrapped((nn.Dropout2d if images else nn.Dropout1d)(0.3)),
        "numpy_dropout": NumpyDropout,
        "python_dropout": PythonDropout,
        "layer_norm": lambda: Wrapped(nn.LayerNorm(WIDTH)),
        "rms_norm": lambda: Wrapped(nn.RMSNorm(WIDTH)),
        "batch_norm": lambda: (FrozenStatistics if o.get("frozen_statistics") else Wrapped)(
            _batch_norm(o, source)
        ),
        "group_norm": lambda: Wrapped(_trained(nn.GroupNorm(2, WIDTH))),
        "instance_norm": lambda: Wrapped(
            _trained(instance(WIDTH, affine=True, track_running_stats=o.get("tracked", False)))
        ),
        "scale": lambda: Function(lambda s, x: x * s.gamma, gamma=1 + _normal(*channels)),
        "one_plus": lambda: Function(lambda s, x: x * (1 + s.w), w=_normal(*channels)),
        "exp_scale": lambda: Function(lambda s, x: x * s.a.exp(), a=_normal(*channels)),
        "shift": lambda: Function(lambda s, x: x + s.b, b=_normal(*channels)),
        "matmul": lambda: Function(lambda s, x: x @ s.w, w=_normal(WIDTH, WIDTH)),
        "einsum": lambda: Function(
            lambda s, x: torch.einsum("...i,oi->...o", x, s.w), w=_normal(WIDTH, WIDTH)
        ),
        "addmm": lambda: Function(
            lambda s, x: torch.addmm(s.b, x, s.w), b=_normal(WIDTH), w=_normal(WIDTH, WIDTH)
        ),
        "tied": TiedPair,
        "lora": LowRank,
        "experts": Experts,
        "ternary": TernaryLinear,
        "reversal": Domain,
        "detach": Detached,
        "mixup": Mixup,
        "batch_centred": BatchCentred,
        "running_centre": lambda: RunningCentre(o.get("reassigned", False)),
        "writes_input": WritesItsInput,
        "branch": Branch,
        "unused": Unused,
        "checkpoint": lambda: Checkpointed(o.get("reentrant", False)),
        "weight_norm": lambda: Wrapped(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
        "spectral_norm": lambda: Wrapped(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        "symmetric": lambda: Wrapped(_symmetric()),
        "conv": lambda: Wrapped(
            conv(
                WIDTH,
                WIDTH,
                3,
                stride=o.get("stride", 1),
                padding=1,
                groups=o.get("groups", 1),
                padding_mode=o.get("padding_mode", "zeros"),
            )
        ),
        "conv_residual": lambda: Residual(
            conv(WIDTH, WIDTH, 3, padding="same"), nn.SiLU(), conv(WIDTH, WIDTH, 1)
        ),
        "conv_transpose": lambda: Wrapped(transposed(WIDTH, WIDTH, 3, padding=1)),
        "attention": lambda: Attention(time_first, o.get("dropout", 0.0), o.get("weights", False)),
        "encoder": lambda: Wrapped(
            nn.TransformerEncoderLayer(
                WIDTH,
                2,
                2 * WIDTH,
                o.get("dropout", 0.0),
                F.gelu,
                batch_first=not time_first,
                norm_first=o.get("norm_first", False),
            )
        ),
        "causal_attention": CausalAttention,
        "gru": lambda: Recurrent(
            "gru", time_first, o.get("packed", False), o.get("bidirectional", False)
        ),
        "lstm": lambda: Recurrent(
            "lstm", time_first, o.get("packed", False), o.get("bidirectional", False)
        ),
        "positions": lambda: Positions(time_first, o.get("by_index", False)),
        "class_token": ClassToken,
        "over_time": OverTime,
        **DERIVED_LAYERS,
    }
    layer = makers[o["kind"]]()
    if o.get("frozen"):
        layer.requires_grad_(False)
    return layer


def _symmetric() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer
