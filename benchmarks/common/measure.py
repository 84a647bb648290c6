"""Interleaved timing and peak memory of several implementations of one task."""

import ctypes
import functools
import statistics
import time
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# about 2 ms in which the GPU waits and the host queues the call to be timed
HEAD_START_CYCLES = 4_000_000
# bytes written before a timed call, in L2 cache sizes, so that its inputs are not in the cache
FLUSHED_CACHES = 4
# a copy far larger than any cache, and a product that fills any GPU; on a CPU they only have to run
COPIED_BYTES = {"cuda": 2**32, "cpu": 2**24}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 128}
RATE_ROUNDS = 10


def interleaved(calls, rounds):
    """Seconds of every call in every round. Calls take turns, so that drift affects all equally;
    each round begins with another call, so that none is always the one with warm caches."""
    seconds = {label: [] for label in calls}
    for label in _turns(calls, rounds):
        _synchronize()
        start = time.perf_counter()
        calls[label]()
        _synchronize()
        seconds[label].append(time.perf_counter() - start)
    return seconds


def on_device(calls, rounds, device):
    """As `interleaved`; on a GPU by CUDA events, with a cold L2 cache. The host's time is left out
    where it is shorter than HEAD_START_CYCLES."""
    if device.type != "cuda":
        return interleaved(calls, rounds)
    cache = FLUSHED_CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(cache, dtype=torch.uint8, device=device)
    seconds = {label: [] for label in calls}
    for label in _turns(calls, rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        calls[label]()
        end.record()
        torch.cuda.synchronize()
        seconds[label].append(start.elapsed_time(end) / 1e3)
    return seconds


@functools.cache
def copy_bandwidth(device):
    """Bytes read and written in a second by a large copy within the device."""
    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    call = {"copy": lambda: target.copy_(source)}
    on_device(call, 2, device)
    return 2 * source.numel() / statistics.median(on_device(call, RATE_ROUNDS, device)["copy"])


def product_rate(device, dtype):
    """Operations in a second of a large square product of random matrices, in torch's current
    float32 matmul precision."""
    return _product_rate(device, dtype, torch.get_float32_matmul_precision())


@functools.cache
def _product_rate(device, dtype, _):
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    call = {"product": lambda: left @ right}
    on_device(call, 2, device)
    seconds = statistics.median(on_device(call, RATE_ROUNDS, device)["product"])
    return 2 * size**3 / seconds


def _turns(calls, rounds):
    labels = list(calls)
    for turn in range(rounds):
        first = turn % max(len(labels), 1)
        yield from labels[first:] + labels[:first]


def ratios(seconds, base):
    """Median seconds of each label over those of `base`."""
    unit = statistics.median(seconds[base])
    return {label: statistics.median(values) / unit for label, values in seconds.items()}


def peak_bytes(call):
    """Most memory that torch held at once during the call, above what it held before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    live = peak = 0
    sizes = {}
    for event in _allocations(profiler):
        fields = event.extra_fields
        # memory allocated before the call may be freed in it; that does not count
        if fields.alloc_size > 0:
            sizes[fields.ptr] = fields.alloc_size
            live += fields.alloc_size
        else:
            live -= sizes.pop(fields.ptr, 0)
        peak = max(peak, live)
    return peak


def peak_resident_bytes(call):
    """Most memory that the process held during the call, above what it held before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _allocations(profiler):
    allocations = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.typed[0] == _EventType.Allocation:
            allocations.append(event)
    return sorted(allocations, key=lambda event: event.start_time_ns)


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
