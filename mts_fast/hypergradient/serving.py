"""Tells an engine's own limits from faults of the model that it runs."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from mts_fast.hypergradient.objective import Objective
from mts_fast.hypergradient.refused import Refused

TORCH = str(Path(torch.__file__).parent)


@contextmanager
def serving(engine: str) -> Iterator[None]:
    """Torch's errors inside (a derivative that does not exist) become `Refused`.

    An exception that the model's own code raises goes through as it is.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        if isinstance(error, Refused) or _raised_by_the_caller(error):
            raise
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise Refused(engine, [f"{type(error).__name__} in {engine}: {first[0]}"]) from error


def _raised_by_the_caller(error: BaseException) -> bool:
    """Whether a `raise` outside of torch made it, rather than a function of torch."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    operation = dis.opname[code.co_code[trace.tb_lasti]]
    return operation == "RAISE_VARARGS" and not code.co_filename.startswith(TORCH)


def sharded_reasons(objective: Objective) -> list[str]:
    """Why an engine that differentiates parameters themselves cannot serve a sharded model."""
    if objective.sharding is None:
        return []
    return ["the model is sharded (fully_shard), whose gradients come from a backward alone"]


def eager(objective: Objective) -> AbstractContextManager[None]:
    """Runs a compiled model as it was written: compiled code has no further derivatives."""
    if not objective.is_compiled:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
