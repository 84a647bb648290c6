"""Models that others wrote: the engine that serves each, its error, and what a step costs.

Per kind: the largest error of the dots and gradients against one backward per sample in float64,
which is asserted first; the share of the parameters' entries that `ghost` serves; an exact step by
engine="auto" over a plain step, turn by turn, in calls that do not check their dots.
"""

import warnings

import foreign_kinds  # noqa: F401, fills FOREIGN
import pytest
import torch
from foreign_models import FAMILY, FOREIGN, Scale
from measure import ratios

import mts_fast
from mts_fast.tuning.timing import interleaved

ROUNDS = 5
# calls of MTSStep before those that are timed: the last of them is checked, the next is the 16th
WARM_UP = 8
CHECKED = Scale()
TIMED = Scale(width=256, length=64, pixels=64, frames=256, layers=2)
# no other axis is as long as the batch: forwards would be checked in every call
BATCH, VALIDATION = 24, 3
# relative errors in float64: exact engines round (observed at most 4e-15), and 1e-6 where a model
# makes float32 numbers in a way that the check cannot see
ALLOWED = 1e-5


def _plain(model, optimizer, loss, inputs, labels):
    def step():
        optimizer.zero_grad()
        loss(
            model(**inputs) if isinstance(inputs, dict) else model(inputs), labels
        ).mean().backward()
        optimizer.step()

    return step


def _loss_of(foreign):
    def loss(output, labels):
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    return foreign.loss or loss


@pytest.mark.parametrize("name", list(FOREIGN))
def bench_foreign_models(benchmark, name):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    small = FOREIGN[name](CHECKED)
    inputs, labels = small.batch(6)
    check = mts_fast.check_engine(small.model, inputs, labels, loss=small.loss)
    engine = next(e for e, error in check.dots.items() if error is not None)
    error = max(check.dots[engine], check.gradients[engine])
    assert error < ALLOWED, f"{engine}: {error:.1e}"

    foreign = FOREIGN[name](TIMED)
    model, loss = foreign.model, _loss_of(foreign)
    inputs, labels = foreign.batch(BATCH)
    val_inputs, val_labels = foreign.batch(VALIDATION)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    selector = mts_fast.Selector(1, 1)
    step = mts_fast.MTSStep(
        model,
        optimizer,
        selector,
        torch.optim.AdamW(selector.parameters(), lr=1e-3),
        loss=loss,
        online_features=False,
    )
    features, classes = torch.randn(BATCH, 1), torch.zeros(BATCH).long()

    def exact():
        return step(
            inputs,
            labels,
            features=features,
            classes=classes,
            val_inputs=val_inputs,
            val_labels=val_labels,
        )

    for _ in range(WARM_UP - 1):
        served = exact().engine
    seconds = {}

    def measure():
        arms = {"plain": _plain(model, optimizer, loss, inputs, labels), "exact": exact}
        seconds.update(interleaved(arms, ROUNDS))

    benchmark.pedantic(measure, rounds=1)
    explanation = mts_fast.explain_engine(model, inputs, labels, loss=loss)
    benchmark.extra_info |= {
        "family": FAMILY[name],
        "engine": served,
        "error": float(f"{error:.1e}"),
        "precision": str(check.dtype).removeprefix("torch."),
        "ghost share": round(explanation.ghost_share, 3),
        "ratios": {"exact step": round(ratios(seconds, "plain")["exact"], 2)},
    }
