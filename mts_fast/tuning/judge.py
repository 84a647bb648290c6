"""One verdict: results are compared with float64 first, then times with what `auto` takes now."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mts_fast.backends.registry import implementation, tunable, use_backend, without
from mts_fast.backends.verdicts.requests import Request
from mts_fast.backends.verdicts.table import Verdict, ignored
from mts_fast.tuning.cases import Case, case_of
from mts_fast.tuning.timing import Calls, DeviceTimes, on_device

ROUNDS = 21
# share of the rival's time that a kernel may take at most
FASTER = 0.95
# interquartile range over median, from which a measurement is repeated once, then not believed
MOST_SPREAD = 0.1
# error allowed, over the rival's, besides the last digit of the results
ERROR_FACTOR = 3.0

Timer = Callable[[Calls, int, torch.device], DeviceTimes]


def judge(request: Request, device: torch.device, timer: Timer = on_device) -> dict[str, Verdict]:
    """Verdicts of all backends that can serve a request, by backend.

    A backend wins where its results are as exact as those of what `auto` would run without it, no
    two of its runs differ, its median time on the device is at most FASTER of the rival's, and the
    host does not lose more than the device gains. Where times spread too much, "wins" is None.

    Raises:
        torch.OutOfMemoryError, RuntimeError: the tensors do not fit into memory.
    """
    verdicts: dict[str, Verdict] = {}
    with use_backend("auto"), ignored(), in_precision(request):
        case = case_of(request, device)
        if case is None:
            return {}
        tensors = _tensors_of(request, case)
        for backend in tunable(request.op, tensors):
            ours = implementation(request.op, backend)
            name, rival = without(request.op, backend, tensors)
            verdict = _checked(request.op, case, ours, rival)
            if not verdict["why"]:
                functions = {"ours": ours, "rival": rival}
                calls = {label: partial(case.run, f) for label, f in functions.items()}
                verdict |= _timed(calls, device, timer)
            wins = not verdict["why"] if verdict.get("spread", 0) <= MOST_SPREAD else None
            verdicts[backend] = {"wins": wins, "rival": name} | verdict
            gc.collect()
    return verdicts


@contextmanager
def in_precision(request: Request) -> Iterator[None]:
    """TF32 and autocast as they were when the request was recorded."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    kind, _, dtype = request.precision.partition(", autocast ")
    products.fp32_precision = kind
    cast = getattr(torch, dtype) if dtype else None
    try:
        with torch.autocast(request.device, cast, enabled=cast is not None):
            yield
    finally:
        products.fp32_precision = before


def _tensors_of(request: Request, case: Case) -> list[Tensor]:
    """The tensors that the op hands to `resolve`, of the case's arguments."""
    count = len(request.tensors)
    tensors: list[Tensor] = []
    for argument in case.arguments:
        parts = argument if isinstance(argument, list) else [argument]
        tensors += [t for t in parts if isinstance(t, Tensor)]
    return tensors[:count]


def _checked(
    op: str, case: Case, ours: Callable[..., object], rival: Callable[..., object]
) -> Verdict:
    """Errors relative to float64, ours and the rival's, and "why" ours is wrong, "" where not."""
    with torch.autocast(case.device.type, enabled=False):
        truth = case.in_float64().run(implementation(op, "reference"))
    results, again = case.run(ours), case.run(ours)
    errors = [relative_error(made, truth) for made in (results, case.run(rival))]
    allowed = ERROR_FACTOR * errors[1] + max(torch.finfo(t.dtype).eps for t in results)
    why = ""
    if any(not torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        why = "two runs differ"
    elif not errors[0] <= allowed:
        why = f"its error {errors[0]:.1e} is more than {allowed:.1e}"
    return {"error": errors[0], "rival_error": errors[1], "why": why}


def relative_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """||results - truth|| / ||truth|| over all tensors; infinite where shapes differ."""
    if [t.shape for t in results] != [t.shape for t in truth]:
        return math.inf
    pairs = zip(results, truth, strict=True)
    off = torch.stack([(made.double() - true).norm() for made, true in pairs]).norm()
    # where the truth is 0, only exact zeros pass
    smallest = torch.finfo(torch.float64).tiny
    return (off / torch.stack([true.norm() for true in truth]).norm().clamp(min=smallest)).item()


def _timed(calls: Calls, device: torch.device, timer: Timer) -> Verdict:
    """Medians in microseconds, their spread, and why the kernel does not win; "" where it does."""
    for attempt in range(2):
        times = timer(calls, ROUNDS, device)
        spread = max(map(_spread, times.device.values()))
        if spread <= MOST_SPREAD or attempt:
            break
    us = {label: 1e6 * statistics.median(seconds) for label, seconds in times.device.items()}
    host = {label: 1e6 * statistics.median(seconds) for label, seconds in times.host.items()}
    gain = us["rival"] - us["ours"]
    why = ""
    if us["ours"] > FASTER * us["rival"]:
        why = f"it takes {us['ours'] / us['rival']:.2f} of the rival's time"
    elif device.type != "cpu" and host["ours"] - host["rival"] > gain:
        why = "the host loses more than the device gains"
    return {
        "us": round(us["ours"], 2),
        "rival_us": round(us["rival"], 2),
        "host_us": round(host["ours"], 2),
        "rival_host_us": round(host["rival"], 2),
        "spread": round(spread, 3),
        "rounds": ROUNDS,
        "why": why,
    }


def _spread(seconds: Sequence[float]) -> float:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle
