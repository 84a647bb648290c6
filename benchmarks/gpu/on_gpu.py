"""Where the GPU benchmarks run, how large, and how they compare several ways to do the same.

MTS_FAST_BENCH_TINY=1 shrinks them, so that with TRITON_INTERPRET=1 every line of them runs on the
CPU, in triton's interpreter; what they then measure says nothing.
"""

import os
import statistics
from contextlib import contextmanager

import pytest
import torch
from measure import copy_bandwidth, interleaved, on_device, peak_bytes, product_rate, ratios

from mts_fast.backends.triton.eligibility import interpreted, triton_reasons

TINY = os.environ.get("MTS_FAST_BENCH_TINY") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
ROUNDS = 2 if TINY else 30
# with the host's share of a call, which a GPU that is kept busy hides
HOST_ROUNDS = 2 if TINY else 10
MIB = 2**20
# error over torch's own in the same dtype, for a backward
ERROR_FACTOR = 3
OURS = "triton"


def why_not():
    """Why the GPU benchmarks do not run here; empty where they do."""
    if not TINY and DEVICE.type != "cuda":
        return "needs a CUDA device; MTS_FAST_BENCH_TINY=1 TRITON_INTERPRET=1 runs a tiny form"
    return "; ".join(triton_reasons())


needs_gpu = pytest.mark.skipif(bool(why_not()), reason=why_not())


def choose(full, tiny):
    """What is measured on a GPU, or its tiny form."""
    return tiny if TINY else full


def compiled(function, mode="default"):
    """torch.compile for these shapes alone; the tiny form traces, and leaves out the compiler."""
    if TINY:
        return torch.compile(function, backend="eager", dynamic=False)
    return torch.compile(function, mode=mode, dynamic=False)


@contextmanager
def tf32(allowed):
    """float32 products and convolutions by TF32, or in full."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def relative_error(found, truth):
    """||found - truth|| / ||truth|| over all tensors."""
    off = torch.stack([(f.double() - t).norm() for f, t in zip(found, truth, strict=True)]).norm()
    # a truth of zeros has to be met exactly
    least = torch.finfo(torch.float64).tiny
    return (off / torch.stack([t.norm() for t in truth]).norm().clamp(min=least)).item()


def assert_as_exact(calls, truth, eps, own="eager"):
    """Every way is as near to the float64 truth as torch's own is, times ERROR_FACTOR, plus eps."""
    allowed = ERROR_FACTOR * relative_error(calls[own](), truth) + eps
    for label, call in calls.items():
        error = relative_error(call(), truth)
        assert error <= allowed, f"{label}: {error:.1e}, allowed {allowed:.1e}"


def compare(benchmark, calls, *, kernel, size, dtype, moved=None, flops=None):
    """Time and peak memory of all ways, into the benchmark's report.

    `moved` and `flops` are what the task needs at least: bytes, and operations on `dtype`.
    """
    for call in calls.values():
        call()
    device_seconds, host_seconds = {}, {}

    def measure():
        device_seconds.update(on_device(calls, ROUNDS, DEVICE))
        host_seconds.update(interleaved(calls, HOST_ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    median = {label: statistics.median(seconds) for label, seconds in device_seconds.items()}
    report = {
        "kernel": kernel,
        "size": size,
        "dtype": dtype_name(dtype),
        "us": {label: round(seconds * 1e6, 1) for label, seconds in median.items()},
        "ratios": rounded(ratios(device_seconds, OURS)),
        "ratios with the host": rounded(ratios(host_seconds, OURS)),
        "peak_mib": {label: round(peak_bytes(call) / MIB, 1) for label, call in calls.items()},
    }
    if moved is not None:
        copy = copy_bandwidth(DEVICE)
        rate = moved / median[OURS]
        report |= {
            "bytes": moved,
            "GB/s": round(rate / 1e9, 1),
            "copy GB/s": round(copy / 1e9, 1),
            "% of copy": round(100 * rate / copy, 1),
        }
    if flops is not None:
        peak = product_rate(DEVICE, dtype)
        rate = flops / median[OURS]
        report |= {
            "flops": flops,
            "TFLOP/s": round(rate / 1e12, 2),
            "product TFLOP/s": round(peak / 1e12, 2),
            "% of product": round(100 * rate / peak, 1),
        }
    benchmark.extra_info |= report


def rounded(values):
    return {label: round(value, 2) for label, value in values.items()}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
