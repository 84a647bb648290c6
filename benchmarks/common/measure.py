"""Ratios of times, and peak memory."""

import ctypes
import statistics
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


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
