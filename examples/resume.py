"""
Resuming after a stop
=====================

A run that is stopped and resumed from its checkpoint takes the same steps, bit for bit, as one that
was never stopped.
"""

import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits

import mts_fast

STEPS = int(os.environ.get("STEPS", "60"))
digits = noisy_digits()
file = Path(tempfile.mkdtemp()) / "checkpoint.pt"


def make_step() -> mts_fast.MTSStep:
    """Model, selector and optimizers at the start of a run."""
    torch.manual_seed(0)
    model = classifier()
    selector = mts_fast.Selector(num_features=4, num_classes=10)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-3)
    return mts_fast.MTSStep(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        selector,
        optimizer,
        selector_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    )


def train(step: mts_fast.MTSStep, until: int) -> list[float]:
    """Train to a step number. A batch depends on that number alone, so no other state is saved."""
    losses = []
    while step.steps < until:
        i = torch.randint(1200, (256,), generator=torch.Generator().manual_seed(step.steps))
        result = step(
            digits.train[0][i],
            digits.train[1][i],
            is_synthetic=digits.is_synthetic[i],
            val_inputs=digits.validation[0],
            val_labels=digits.validation[1],
        )
        losses.append(float(result.loss))
    return losses


# %%
# One run without a stop, and one that is stopped after half of the steps.

whole = train(make_step(), STEPS)
stopped = make_step()
first = train(stopped, STEPS // 2)
torch.save(stopped.state_dict(), file)

# %%
# A new process would begin here.

resumed = make_step()
resumed.load_state_dict(torch.load(file))
second = train(resumed, STEPS)
assert first + second == whole

plt.plot(whole, label="never stopped", linewidth=4, alpha=0.4)
plt.plot(range(len(first), STEPS), second, label="resumed")
plt.xlabel("step")
plt.ylabel("training loss")
plt.legend()
plt.show()
