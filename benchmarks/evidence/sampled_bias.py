"""Bias of a whole sampled step: the mean of the selector's gradient over draws against the exact.

`python benchmarks/evidence/sampled_bias.py` writes benchmarks/results/sampled_bias.json. Everything
stays fixed but the draw; theta' and v follow it, as in training. Bias and deviation are norms over
the selector's parameters, the deviation that of one draw.
"""

import copy
import json
from pathlib import Path

import torch
from torch import nn

import mts_fast

CANDIDATES, DRAWS = 64, 1000
OUT = Path(__file__).resolve().parents[1] / "results" / "sampled_bias.json"
OPTIMIZERS = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def bias_of(optimizer):
    """k -> bias over deviation."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    selector = mts_fast.Selector(4 + 3, 4, hidden=(8,))
    step = mts_fast.MTSStep(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        selector,
        torch.optim.SGD(selector.parameters(), lr=0.5),
        check="never",
    )
    inputs, features = torch.randn(CANDIDATES, 16), torch.randn(CANDIDATES, 3)
    labels = torch.randint(4, (CANDIDATES,))
    val_inputs = torch.randn(32, 16)
    val_labels = (val_inputs[:, :4] + 0.3 * torch.randn(32, 4)).argmax(1)
    clean = torch.arange(CANDIDATES) % 2 == 0  # half of the labels can be learned
    labels[clean] = inputs[clean, :4].argmax(1)

    def gradient():
        step(inputs, labels, features=features, val_inputs=val_inputs, val_labels=val_labels)
        return torch.cat([p.grad.flatten() for p in selector.parameters() if p.grad is not None])

    for _ in range(10):
        gradient()
    state = copy.deepcopy(step.state_dict())
    exact = gradient()
    ratios = {}
    for k in (4, 8, 16, 32):
        draws = []
        for _ in range(DRAWS):
            step.load_state_dict(state)
            step.compute = k
            draws.append(gradient())
        errors = torch.stack(draws) - exact
        deviation = (errors - errors.mean(0)).square().sum(1).mean().sqrt()
        ratios[k] = {
            "bias / deviation": round(float(errors.mean(0).norm() / deviation), 3),
            "bias / exact": round(float(errors.mean(0).norm() / exact.norm()), 3),
        }
        step.compute = None
    return ratios


if __name__ == "__main__":
    record = {
        "command": "python benchmarks/evidence/sampled_bias.py",
        "candidates": CANDIDATES,
        "draws": DRAWS,
        "rows": {name: bias_of(name) for name in OPTIMIZERS},
    }
    OUT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["rows"], indent=1))
