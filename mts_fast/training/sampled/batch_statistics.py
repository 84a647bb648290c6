"""BatchNorm in a sampled step: statistics of all M candidates, their derivative from the computed.

In train mode a sample's loss depends on the whole batch, through mean and variance. The k computed
samples take the values of stage 1, over all M, and the derivative of a weighted mean over A:

    m = m1 + m_A - stopgrad(m_A),      m_A = sum_A c x / M
    v = v1 + v_A - stopgrad(v_A),      v_A = sum_A c (x - m1)^2 / M

each averaged over the axes between, too. The derivative of v has no term from m: over all M that
term is 0. Constant statistics would lose a third of the gradient even at k = M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mts_fast._check import fail
from mts_fast._isolation import World
from mts_fast.hypergradient import LabelledBatch

OP = "MTSStep"
Forward = Callable[..., Any]


class Moments(NamedTuple):
    """Mean and (population) variance per channel [C], in float32 at least, and their weight."""

    mean: Tensor
    variance: Tensor
    weight: float = 1.0

    def joined(self, other: Moments) -> Moments:
        """Of both parts; the means' difference is squared, so that nothing cancels (Chan 1983)."""
        weight = self.weight + other.weight
        share = other.weight / weight
        difference = other.mean - self.mean
        return Moments(
            self.mean + share * difference,
            self.variance
            + share * (other.variance - self.variance)
            + share * (1 - share) * difference.square(),
            weight,
        )


def batch_norms(world: World) -> list[_BatchNorm]:
    """The BatchNorm modules that use the statistics of the batch in the present modes."""
    return [
        m
        for m in world.modules
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)
    ]


@dataclass
class CandidateStatistics:
    """The moments of each call of each BatchNorm over all M candidates."""

    modules: list[_BatchNorm]
    size: int  # M
    # per module, one entry for each of its calls in a forward
    moments: dict[nn.Module, list[Moments]] = field(default_factory=dict)

    @contextmanager
    def recording(self, weight: float) -> Iterator[None]:
        """Inside, one forward of a part of the candidates adds its moments; `weight`: its size."""
        calls: dict[nn.Module, int] = {}

        def record(module: _BatchNorm, part: Moments) -> None:
            k = calls.get(module, 0)
            calls[module] = k + 1
            entries = self.moments.setdefault(module, [])
            if k < len(entries):
                entries[k] = entries[k].joined(part)
            else:
                entries.append(part)

        def watched(module: _BatchNorm) -> Forward:
            plain = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                with _BatchNormOutputs() as outputs:
                    y = plain(*args, **kwargs)
                x = next(iter([*args, *kwargs.values()]))
                record(module, outputs.moments(x, module.eps)._replace(weight=weight))
                return y

            return forward

        with _forwards({m: watched(m) for m in self.modules}):
            yield


class _BatchNormOutputs(TorchDispatchMode):
    """Reads mean and 1 / sqrt(variance + eps) of the batch from the operator's own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: tuple[Tensor, Tensor] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if "batch_norm" in func.__name__ and isinstance(outputs, tuple) and len(outputs) > 2:
            self._outputs = outputs[1], outputs[2]
        return outputs

    def moments(self, x: Tensor, eps: float) -> Moments:
        """Of the last call, else computed from its input."""
        if self._outputs is not None and self._outputs[0].shape == x.shape[1:2]:
            mean, inverse = map(in_full, self._outputs)
            return Moments(mean, inverse.pow(-2) - eps)
        full = in_full(x)
        axes = [i for i in range(x.ndim) if i != 1]
        variance, mean = torch.var_mean(full, axes, correction=0)
        return Moments(mean, variance)


class _Replaced(TorchFunctionMode):
    """Inside, torch's batch_norm of an input is another function of it."""

    def __init__(self, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._normalize = normalize

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, torch.batch_norm):
            return self._normalize(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _forwards(forwards: Mapping[_BatchNorm, Forward]) -> Iterator[None]:
    """Inside, modules run these in place of their own."""
    before: dict[_BatchNorm, Any] = {m: vars(m).get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


@dataclass(frozen=True)
class ComputedBatch(LabelledBatch):
    """The computed samples, whose forwards take the statistics of all candidates."""

    factors: Tensor  # c [k]
    statistics: CandidateStatistics
    # what the sums over A are divided by: M, or of a micro-batch the sum of its c, so that each
    # has an estimate of the whole batch's derivative
    total: float | Tensor
    # m_A and v_A of every call in the first forward of these samples, which they are taken at
    first: dict[tuple[nn.Module, int], Moments] = field(default_factory=dict)

    def at(self, samples: slice | Tensor) -> ComputedBatch:
        """Some of the samples."""
        part, factors = super().at(samples), self.factors[samples]
        return ComputedBatch(
            part.inputs, part.labels, factors, self.statistics, factors.sum(), name=self.name
        )

    @contextmanager
    def around_forward(self) -> Iterator[None]:
        """Inside, BatchNorm modules take the candidates' statistics, and move none."""
        with _forwards({m: self._forward_of(m) for m in self.statistics.modules}):
            yield

    def _forward_of(self, module: _BatchNorm) -> Forward:
        """The module's own forward, in which the normalisation is replaced."""
        moments = self.statistics.moments.get(module, [])
        plain = module.forward
        calls = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if not moments:
                hint = "leave compute= out, or put the layer into eval mode"
                got = f"a {type(module).__name__} that only some forwards of a batch run"
                expected = "one that runs the same BatchNorm layers in every forward"
                fail(RuntimeError, OP, "model", expected, got, hint)
            k = calls % len(moments)  # a checkpointed part of the model runs again in the backward
            calls += 1
            with _Replaced(lambda x: self._normalized(module, k, moments[k], x)):
                return plain(*args, **kwargs)

        return forward

    def _normalized(self, module: _BatchNorm, k: int, moments: Moments, x: Tensor) -> Tensor:
        full = in_full(x)
        # a sample may be several rows (views, patches); all have its factor
        times, left = divmod(len(x), len(self.factors))
        if left:
            hint = "leave compute= out, or put the layer into eval mode"
            got = f"{len(x)} rows of {len(self.factors)} samples in a BatchNorm"
            fail(RuntimeError, OP, "model", "one with as many rows for each sample", got, hint)
        c = self.factors.to(full.dtype).repeat_interleave(times)
        rows = full.flatten(2) if full.ndim > 2 else full.unsqueeze(2)  # [k, C, S]
        scale = c / (self.total * times * rows.shape[2])
        mean_here = scale @ rows.sum(2)  # [C]
        centred = rows - moments.mean.unsqueeze(1)
        variance_here = scale @ centred.square().sum(2)
        here = Moments(mean_here.detach(), variance_here.detach())
        first = self.first.setdefault((module, k), here)
        mean = moments.mean + (mean_here - first.mean)
        variance = moments.variance + (variance_here - first.variance)
        factor = (variance + module.eps).rsqrt()
        if module.weight is not None:
            factor = factor * module.weight
        shift = -mean * factor
        if module.bias is not None:
            shift = shift + module.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return torch.addcmul(shift.view(shape), full, factor.view(shape)).to(x.dtype)


def in_full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
