"""`mts-fast tune`: times the kernels for what a training asks of them; a line for each verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mts_fast._check import check_place, fail
from mts_fast.backends.registry import has_kernels
from mts_fast.backends.verdicts.requests import Request, read_requests, record_requests
from mts_fast.cli.users_model import users_model
from mts_fast.training import MTSStep, Selector
from mts_fast.tuning.run import OP, Judged, path_for, tune

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# small enough that a step changes no result by much, and is no special case
LR = 1e-3
# the engines check themselves in the first calls, which run other operators, too
CALLS = 3


def run_tune(
    source: str | None, model: str | None, optimizer: str | None, device: str | None, again: bool
) -> int:
    """Record or read requests, time them, and print what was judged; returns the exit status: 1
    where something could not be timed."""
    if (source is None) == (model is None):
        got = "neither" if source is None else "both"
        fail(ValueError, OP, "--from or --model", "given, one of them", got, "see --help")
    if optimizer is not None and model is None:
        hint = "the requests of --from have their own"
        fail(ValueError, OP, "--optimizer", "given with --model only", repr(optimizer), hint)
    place = _place(device)
    path = path_for(place)
    if source is not None:
        requests = read_requests(OP, "--from", source)
    else:
        assert model is not None
        requests = _requests_of(model, optimizer or "adamw", place)
    # an op that has no kernel for this device has nothing to be timed
    timed = [r for r in requests if r.device == place.type and has_kernels(r.op, place)]
    if not timed:
        kinds = sorted({r.device for r in requests})
        expected, got = f"with ops that have kernels on {place}", f"requests for {kinds}"
        hint = "record a step on that device, under backend 'auto'"
        fail(ValueError, OP, "--from" if model is None else "--model", expected, got, hint)
    failed = 0
    for judged in tune(timed, place, again=again):
        failed += judged.verdict is None
        print(line_of(judged), flush=True)
    print(f"verdicts: {path}")
    return 1 if failed else 0


def line_of(judged: Judged) -> str:
    """One verdict as text."""
    what = f"{judged.request.op} {judged.request.variant}".strip()
    shapes = judged.request.key.rpartition(" | ")[2]
    verdict = judged.verdict
    if verdict is None:
        return f"{what}: not judged, {judged.why} ({shapes})"
    outcome = "wins" if verdict["wins"] else f"no: {verdict['why']}"
    times = f", {verdict['us']} us against {verdict['rival_us']}" if "us" in verdict else ""
    known = "; timed before" if judged.old else ""
    return f"{what}: {judged.backend} over {verdict['rival']}{times}: {outcome}{known} ({shapes})"


def _place(device: str | None) -> torch.device:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = check_place(OP, "--device", name)
    if place.type not in ("cpu", "cuda"):
        fail(ValueError, OP, "--device", "cpu or cuda", repr(name), "kernels run on those")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def _requests_of(spec: str, optimizer: str, place: torch.device) -> list[Request]:
    """What a step of the user's model asks for, with half of the batch to validate by."""
    with (
        users_model(OP, spec, with_batch=True) as (model, (inputs, labels)),
        tempfile.TemporaryDirectory() as folder,
    ):
        _check_batch(inputs, labels)
        model.to(place)
        inputs, labels = inputs.to(place), labels.to(place)
        step = _step(model, optimizer, inputs)
        half = max(len(labels) // 2, 1)
        file = Path(folder) / "requests.json"
        with record_requests(file):
            for _ in range(CALLS):
                step(
                    inputs=inputs,
                    labels=labels,
                    val_inputs=inputs[:half],
                    val_labels=labels[:half],
                )
        return read_requests(OP, "--model", file)


def _step(model: nn.Module, optimizer: str, inputs: Tensor) -> MTSStep:
    with torch.no_grad():
        classes = model(inputs).shape[-1]
    selector = Selector(0, classes, hidden=(16,)).to(inputs.device)
    return MTSStep(
        model,
        OPTIMIZERS[optimizer](model.parameters(), lr=LR),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=LR),
        online_features=False,
    )


def _check_batch(inputs: object, labels: object) -> None:
    pair: Sequence[object] = (inputs, labels)
    if not all(isinstance(part, Tensor) for part in pair) or len(labels) == 0:  # type: ignore[arg-type]
        got = tuple(type(part).__name__ for part in pair)
        hint = "for other batches use mts_fast.record_requests in your own loop, and --from"
        fail(TypeError, OP, "what FACTORY() returns", "tensors of at least one sample", got, hint)
