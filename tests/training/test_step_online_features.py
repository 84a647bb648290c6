"""The online features that a step gives to the selector, and their running statistics."""

import pytest
import torch
from comparison import relative
from step_run import StepRun

from mts_fast import reference

# exact to rounding, and the features do not depend on the engine.
EXACT_ENGINE = "forward_mode"


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])  # this batch's; the last batch's; running
def test_online_features_that_the_selector_sees(momentum, device):
    run = StepRun(
        device, dtype=torch.float64, engine=EXACT_ENGINE, online_momentum=momentum, online_k=2
    )
    seen = []
    run.selector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    running = {}
    for seed in range(3):
        arguments = run.arguments(seed)
        with torch.no_grad():
            penultimate, val = (run.model[:-1](arguments[k]) for k in ("inputs", "val_inputs"))
        columns = []
        for name, column in zip(
            ("nearest", "centroid"), reference.online_features(penultimate, val, k=2), strict=True
        ):
            batch = torch.stack([column.mean(), column.var(correction=0)])
            if momentum is not None and name in running:
                running[name] = momentum * running[name] + (1 - momentum) * batch
            else:
                running[name] = batch
            mean, variance = running[name]
            columns.append((column - mean) / (variance + 1e-8).sqrt())
        seen.clear()
        run.step(**arguments)
        expected = torch.cat([*columns, arguments["features"]], dim=1)
        # once for row 1 and once for row 9; observed 0
        assert len(seen) == 2
        assert all(relative(h, expected) < 1e-12 for h in seen)


def test_running_statistics_move_with_the_selectors_batch(device):
    """They are updated once per step, with the selector batch only."""
    run = StepRun(device, dtype=torch.float64, engine=EXACT_ENGINE, online_momentum=0.5)
    running = None
    for seed in range(3):
        arguments = run.arguments(seed, two_batches=True)
        inputs = arguments["selector_batch"].inputs, arguments["val_inputs"]
        with torch.no_grad():
            nearest, _ = reference.online_features(*(run.model[:-1](x) for x in inputs))
        batch = torch.stack([nearest.mean(), nearest.var(correction=0)])
        running = batch if running is None else 0.5 * running + 0.5 * batch
        run.step(**arguments)
        moments = run.step.state_dict()["online"]["running"]["nearest"]
        assert relative(moments, running) < 1e-12  # observed 0


def test_feature_layer_names_where_features_are_taken(device):
    run = StepRun(device, dtype=torch.float64, engine=EXACT_ENGINE, feature_layer="0")
    seen = []
    run.selector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    arguments = run.arguments(0)
    run.step(**arguments)
    nearest, centroid = reference.online_features(arguments["inputs"], arguments["val_inputs"])
    columns = [
        reference.standardize(nearest),
        reference.standardize(centroid),
        arguments["features"],
    ]
    assert relative(seen[0], torch.cat(columns, dim=1)) < 1e-12  # observed 0
