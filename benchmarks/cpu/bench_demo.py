"""Training steps of the demo's MTS arm by engine, and plain steps of the same classifier."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from measure import interleaved, ratios

from mts_fast.demo.classifiers import SETTINGS, batches, build_classifier, build_optimizer
from mts_fast.demo.scenario import make_scenario
from mts_fast.demo.selection import MTSRun
from mts_fast.features import PAPER_COLUMNS, FeatureTable

ROUNDS = 15
STEPS = 20


def random_table(size):
    """Random columns of the paper's widths: a step's time does not depend on their values."""
    names = dict.fromkeys(PAPER_COLUMNS)
    widths = {"real_nearest3_cosine": 3, "synthetic_nearest3_cosine": 3}
    return FeatureTable({name: torch.randn(size, widths.get(name, 1)) for name in names})


@pytest.mark.parametrize("data", ["digits", "fashion"])
def bench_demo(benchmark, data):
    try:
        scenario = make_scenario(data, 0)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    settings = SETTINGS[data]
    generator = torch.Generator().manual_seed(0)
    indices = list(islice(batches(len(scenario.pool), settings, generator), STEPS))
    table = random_table(len(scenario.pool))
    runs = {
        engine: MTSRun.with_features(scenario, table, replace(settings, engine=engine), 0)
        for engine in ("auto", "finite_difference")
    }
    model = build_classifier(data)
    optimizer, _ = build_optimizer(model, settings)

    def plain():
        for i in indices:
            batch = scenario.pool[i]
            optimizer.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()

    def steps(run):
        for i in indices:
            run.take_step(i)

    calls = {"plain": plain} | {e: lambda run=run: steps(run) for e, run in runs.items()}
    for call in calls.values():
        call()
    seconds = {}
    benchmark.pedantic(lambda: seconds.update(interleaved(calls, ROUNDS)), rounds=1)
    benchmark.extra_info["ratios"] = {k: round(v, 2) for k, v in ratios(seconds, "plain").items()}
