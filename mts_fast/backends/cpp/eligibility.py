"""Why the C++ and CUDA kernels cannot serve some tensors: the reasons that all ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mts_fast._columns import any_requires_grad, devices_of
from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.eligibility import several_devices

DTYPES = (torch.float32, torch.float64)


def reasons_against_cpp(tensors: Sequence[Tensor]) -> list[str]:
    """Why no kernel can serve these tensors, the first of which has the dtype that the op computes
    in; empty where one can."""
    status = extension()
    reasons = [] if status.available else [status.reason]
    reasons += several_devices(tensors)
    if (
        any(device.type == "cuda" for device in devices_of(tensors))
        and status.available
        and not status.info["cuda"]
    ):
        reasons.append("it was built without CUDA kernels; MTS_FAST_CUDA=1 builds them")
    if tensors[0].dtype not in DTYPES:
        reasons.append(f"its kernel takes float32 or float64, not {tensors[0].dtype}")
    if any_requires_grad(tensors):
        reasons.append("its kernel has no backward")
    return reasons
