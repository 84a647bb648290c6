"""Interleaved times of several calls: in turns, so that drift affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

Calls = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]

# the GPU waits at least so long before a call to be timed, while the host queues it: about 2 ms
HEAD_START_CYCLES = 4_000_000
CYCLES_PER_SECOND = 2e9
# the head start, in times that the host needs to queue the call
MARGIN = 1.5
# bytes written before a timed call, in L2 cache sizes, so that its inputs are not in the cache
FLUSHED_CACHES = 4


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of every call in every round: on the device, and of the host to queue it."""

    device: Times = field(default_factory=dict)
    host: Times = field(default_factory=dict)


def interleaved(calls: Calls, rounds: int) -> Times:
    """Seconds of every call in every round, host and device together. Each round begins with
    another call, so that none is always the one with warm caches."""
    seconds: Times = {label: [] for label in calls}
    for label in _turns(calls, rounds):
        _synchronize()
        start = time.perf_counter()
        calls[label]()
        _synchronize()
        seconds[label].append(time.perf_counter() - start)
    return seconds


def on_device(calls: Calls, rounds: int, device: torch.device) -> DeviceTimes:
    """As `interleaved`, on a GPU by CUDA events and with a cold L2 cache.

    The device sleeps for longer than the host needs to queue a call, so that it never waits for the
    host within the call. On a CPU the host's times are those of the calls.
    """
    if device.type != "cuda":
        seconds = interleaved(calls, rounds)
        return DeviceTimes(seconds, seconds)
    with torch.cuda.device(device):  # events and the sleep are of the current one
        return _on_gpu(calls, rounds, device)


def _on_gpu(calls: Calls, rounds: int, device: torch.device) -> DeviceTimes:
    cache = FLUSHED_CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(cache, dtype=torch.uint8, device=device)
    cycles = {label: _head_start(call) for label, call in calls.items()}
    times = DeviceTimes({label: [] for label in calls}, {label: [] for label in calls})
    for label in _turns(calls, rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(cycles[label])
        start.record()
        before = time.perf_counter()
        calls[label]()
        times.host[label].append(time.perf_counter() - before)
        end.record()
        torch.cuda.synchronize()
        times.device[label].append(start.elapsed_time(end) / 1e3)
    return times


def _head_start(call: Callable[[], object]) -> int:
    """Cycles of sleep in which the host can queue the call."""
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return max(HEAD_START_CYCLES, int(MARGIN * statistics.median(seconds) * CYCLES_PER_SECOND))


def _turns(calls: Calls, rounds: int) -> Iterator[str]:
    labels = list(calls)
    for turn in range(rounds):
        first = turn % max(len(labels), 1)
        yield from labels[first:] + labels[:first]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
