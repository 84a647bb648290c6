"""global_norm and perturb by the Triton kernels, and which tensors the kernels serve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast import reference
from mts_fast.backends.eligibility import same_layout
from mts_fast.backends.triton.eligibility import reasons_against_triton


def reasons(tensors: Sequence[Tensor]) -> list[str]:
    """Why the kernels cannot serve these tensors."""
    return reasons_against_triton(tensors, backward=False)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm [] of all entries; tensors with gaps in memory are copied."""
    from mts_fast.backends.triton.kernels import perturb as kernel

    return kernel.global_norm([t if same_layout(t, t) else t.contiguous() for t in tensors])


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """parameter + scale * direction; the reference serves pairs of different memory layouts."""
    from mts_fast.backends.triton.kernels import perturb as kernel

    pairs = list(zip(parameters, direction, strict=True))
    fitting = [same_layout(p, p) and same_layout(p, v) for p, v in pairs]
    served = [pair for pair, fits in zip(pairs, fitting, strict=True) if fits]
    moved = iter(kernel.perturb([p for p, _ in served], [v for _, v in served], scale))
    return [
        next(moved) if fits else reference.perturb([p], [v], scale)[0]
        for (p, v), fits in zip(pairs, fitting, strict=True)
    ]
