"""Device and sizes of the GPU benchmarks, and how they compare implementations.

MTS_FAST_BENCH_TINY=1 shrinks the sizes, so that with TRITON_INTERPRET=1 every line of the
benchmarks runs on the CPU, in triton's interpreter; the times then mean nothing.
"""

import os
import statistics
from contextlib import contextmanager

import pytest
import torch
from measure import peak_bytes, ratios
from rates import copy_bandwidth, product_rate

from mts_fast.backends.triton.eligibility import interpreted, triton_reasons
from mts_fast.tuning.judge import relative_error
from mts_fast.tuning.timing import interleaved, on_device

TINY = os.environ.get("MTS_FAST_BENCH_TINY") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
ROUNDS = 2 if TINY else 30
# rounds that include the host's time, which a busy GPU hides
HOST_ROUNDS = 2 if TINY else 10
MIB = 2**20
# allowed error of a backward, over torch's in the same dtype
ERROR_FACTOR = 3
OURS = "triton"


def why_not():
    """Why the GPU benchmarks do not run here; empty where they do."""
    if not TINY and DEVICE.type != "cuda":
        return "needs a CUDA device; MTS_FAST_BENCH_TINY=1 TRITON_INTERPRET=1 runs a tiny form"
    return "; ".join(triton_reasons())


needs_gpu = pytest.mark.skipif(bool(why_not()), reason=why_not())


def choose(full, tiny):
    """The size for a GPU, or the tiny one."""
    return tiny if TINY else full


def compiled(function, mode="default"):
    """torch.compile for static shapes; the tiny form traces without compiling."""
    if TINY:
        return torch.compile(function, backend="eager", dynamic=False)
    return torch.compile(function, mode=mode, dynamic=False)


@contextmanager
def tf32(allowed):
    """Sets whether float32 products and convolutions may use TF32."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def assert_as_exact(calls, truth, eps, base="eager"):
    """Every error against the float64 truth is at most ERROR_FACTOR times torch's, plus eps."""
    allowed = ERROR_FACTOR * relative_error(calls[base](), truth) + eps
    for label, call in calls.items():
        error = relative_error(call(), truth)
        assert error <= allowed, f"{label}: {error:.1e}, allowed {allowed:.1e}"


def compare(benchmark, calls, *, kernel, size, dtype, moved=None, flops=None):
    """Time and peak memory of all implementations, into the benchmark's report.

    `moved` and `flops` are the least that the task needs: bytes, and operations on `dtype`.
    """
    for call in calls.values():
        call()
    device_seconds, host_seconds = {}, {}

    def measure():
        device_seconds.update(on_device(calls, ROUNDS, DEVICE).device)
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
