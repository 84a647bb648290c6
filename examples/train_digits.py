"""
A training loop on images
=========================

A pool of digits, a third of which has a wrong label, and 100 clean ones. The selector learns which
samples to trust while the classifier is trained.
"""

import os

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits

import mts_fast
from mts_fast.features import FeatureTable, distribution_features

STEPS = int(os.environ.get("STEPS", "300"))

torch.manual_seed(0)
digits = noisy_digits()
images, labels = digits.train
val_images, val_labels = digits.validation

# %%
# Offline features of each sample: where its image lies among those of its class.

table = FeatureTable(distribution_features(images, labels, digits.is_synthetic)).standardized()

# %%
# ``step`` takes the place of forward, backward, ``optimizer.step()`` and ``zero_grad()``.

model = classifier()
selector = mts_fast.Selector(num_features=4 + table.shape[1], num_classes=10)
step = mts_fast.MTSStep(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    selector,
    torch.optim.AdamW(selector.parameters(), lr=1e-3),
)
for number in range(STEPS):
    i = torch.randint(len(labels), (512,))
    result = step(
        images[i],
        labels[i],
        features=table[i],
        is_synthetic=digits.is_synthetic[i],
        val_inputs=val_images,
        val_labels=val_labels,
    )
    if number % 50 == 0:
        print(f"{number:4d}  loss {result.loss:.3f}  validation loss {result.val_loss:.3f}")

# %%
# The weights at the end, and the classifier's test accuracy.

weights = step.weights(
    images, labels, features=table, is_synthetic=digits.is_synthetic, val_inputs=val_images
)
test_images, test_labels = digits.test
with torch.no_grad():
    accuracy = (model(test_images).argmax(1) == test_labels).float().mean()
print(f"test accuracy {accuracy:.3f}, engine {result.engine}")

plt.hist([weights[~digits.wrong], weights[digits.wrong]], 30, label=["right label", "wrong label"])
plt.xlabel("weight")
plt.ylabel("samples")
plt.legend()
plt.show()
