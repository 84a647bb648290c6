"""
Weights and GSNR in TensorBoard
===============================

What to watch while a selector learns: the signal-to-noise ratio of its gradient (GSNR), the
effective batch size, and the weights themselves.
"""

import os
import tempfile

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits

import mts_fast
from mts_fast.features import FeatureTable, distribution_features

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise SystemExit("this example needs tensorboard: pip install 'mts_fast[examples]'") from error

STEPS = int(os.environ.get("STEPS", "200"))

torch.manual_seed(0)
digits = noisy_digits()
images, labels = digits.train
table = FeatureTable(distribution_features(images, labels, digits.is_synthetic)).standardized()
model = classifier()
selector = mts_fast.Selector(num_features=4 + table.shape[1], num_classes=10)
step = mts_fast.MTSStep(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    selector,
    torch.optim.AdamW(selector.parameters(), lr=1e-3),
    track_gsnr=True,
)

# %%
# Results are tensors until they are read; reading only every tenth step costs little on a GPU, too.

folder = tempfile.mkdtemp()
history = []
with SummaryWriter(folder) as writer:
    for number in range(STEPS):
        i = torch.randint(len(labels), (512,))
        result = step(
            images[i],
            labels[i],
            features=table[i],
            is_synthetic=digits.is_synthetic[i],
            val_inputs=digits.validation[0],
            val_labels=digits.validation[1],
        )
        if number % 10 == 0:
            scalars = {**result.statistics.read(), "gsnr": float(result.gsnr)}
            for name, value in scalars.items():
                writer.add_scalar(f"selector/{name}", value, number)
            writer.add_histogram("selector/weights", result.weights, number)
            history.append(scalars)
print(f"tensorboard --logdir {folder}")

# %%
# Two of the curves in TensorBoard.

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, name in zip(axes, ("gsnr", "effective_batch_size"), strict=True):
    axis.plot([10 * k for k in range(len(history))], [row[name] for row in history])
    axis.set(xlabel="step", title=name)
plt.show()
