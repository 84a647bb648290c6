"""Training steps of the demo's MTS arm by engine, and plain steps of the same classifier."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from measure import ratios

from mts_fast.demo.arms.learned import MTSRun
from mts_fast.demo.arms.seed_run import SeedRun
from mts_fast.demo.data import make_scenario
from mts_fast.demo.training import SETTINGS, build_classifier, build_optimizer, epochs
from mts_fast.tuning.timing import interleaved

ROUNDS = 15
STEPS = 20
# of the paper's offline features; a step's time does not depend on their values
COLUMNS = 13


@pytest.mark.parametrize("data", ["coloured-digits", "coloured-fashion"])
def bench_demo(benchmark, data):
    try:
        scenario = make_scenario(data, 0)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    settings = SETTINGS[data]
    pool = scenario.pool
    generator = torch.Generator().manual_seed(0)
    indices = list(islice(epochs(len(pool), settings, generator), STEPS))
    table = torch.randn(len(pool), COLUMNS)
    runs = {}
    for engine in ("auto", "finite_difference"):
        seed_run = SeedRun(scenario, replace(settings, engine=engine), 0)
        runs[engine] = MTSRun.with_features(seed_run, table, {})
    model = build_classifier(data)
    optimizer, _ = build_optimizer(model.parameters(), settings)

    def plain():
        for i in indices:
            optimizer.zero_grad()
            F.cross_entropy(model(pool.images[i]), pool.labels[i]).backward()
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
