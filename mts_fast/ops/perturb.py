"""global_norm and perturb: the length of a direction, and parameters moved along it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mts_fast import reference
from mts_fast._check import check_device, check_floating, fail
from mts_fast.backends import flat
from mts_fast.backends.registry import register, register_flat, register_triton, resolve
from mts_fast.backends.triton import perturb as triton

NORM, PERTURB = "global_norm", "perturb"
register(NORM, "reference", reference.global_norm)
register(PERTURB, "reference", reference.perturb)
register_flat(PERTURB, flat.perturb)
register_triton(NORM, triton.global_norm, triton.reasons)
register_triton(PERTURB, triton.perturb, triton.reasons)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all tensors together.

    norm = sqrt(sum_k sum_j t_kj^2).

    Args:
        tensors: at least one; any shapes, floating point, on one device.

    Returns:
        norm [], of the dtype that the tensors' dtypes promote to. Nothing waits for the device.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: no tensor, or tensors on several devices.
        RuntimeError: an explicit backend that cannot run.

    Notes:
        The Triton kernel squares in float32 (float64 of float64), adds the sums of blocks in
        float64 and is deterministic.

    Source: row 6, the step of central differences.

    Example:
        >>> import torch
        >>> from mts_fast.ops.perturb import global_norm
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]).item()
        5.0
    """
    _check(NORM, "tensors", tensors, tensors, "tensors[0]")
    return resolve(NORM, tensors)(tensors)


def perturb(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], scale: Tensor
) -> list[Tensor]:
    """All parameters moved along a direction, out of place.

    moved_k = parameter_k + scale direction_k.

    Args:
        parameters: at least one; floating point, on one device. Only read.
        direction: one per parameter, of its shape.
        scale: [], on their device; it is not read on the host.

    Returns:
        New tensors of the parameters' shapes and dtypes.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: no parameter, differing lengths, shapes or devices.
        RuntimeError: an explicit backend that cannot run.

    Notes:
        The Triton kernel is one launch for all tensors that share dtypes and alignment. A
        parameter whose memory layout is not its direction's, or has gaps, runs on the reference.

    Source: row 6, theta + e v and theta - e v.

    Example:
        >>> import torch
        >>> from mts_fast.ops.perturb import perturb
        >>> perturb([torch.ones(2)], [torch.tensor([1.0, -1.0])], torch.tensor(0.5))[0].tolist()
        [1.5, 0.5]
    """
    _check(PERTURB, "parameters", parameters, parameters, "parameters[0]")
    if len(direction) != len(parameters):
        expected = f"one per parameter ({len(parameters)})"
        fail(ValueError, PERTURB, "direction", expected, len(direction), "pass one each")
    _check(PERTURB, "direction", direction, parameters, "parameters")
    for p, v in zip(parameters, direction, strict=True):
        if p.shape != v.shape:
            expected = f"of shape {tuple(p.shape)}"
            fail(ValueError, PERTURB, "direction", expected, tuple(v.shape), "see its parameter")
    check_floating(PERTURB, "scale", scale, ndim=0)
    check_device(PERTURB, "scale", scale, parameters[0].device, "parameters")
    return resolve(PERTURB, [*parameters, *direction, scale])(parameters, direction, scale)


def _check(op: str, arg: str, tensors: Sequence[Tensor], like: Sequence[Tensor], name: str) -> None:
    """Floating-point tensors, at least one, on the device of the first of `like`."""
    if not tensors:
        fail(ValueError, op, arg, "at least one tensor", "none", "pass the parameters")
    for i, tensor in enumerate(tensors):
        check_floating(op, f"{arg}[{i}]", tensor)
        check_device(op, f"{arg}[{i}]", tensor, like[0].device, name)
