"""
Scoring a pool and choosing its best part
=========================================

The weights of a short run decide which half of the synthetic samples another classifier is trained
on. It is compared with a random half, and with the samples whose labels are right.
"""

import os

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits

import mts_fast
from mts_fast.features import FeatureTable, distribution_features

STEPS = int(os.environ.get("STEPS", "300"))

torch.manual_seed(0)
digits = noisy_digits(share=0.5)
images, labels = digits.train
table = FeatureTable(distribution_features(images, labels, digits.is_synthetic)).standardized()

# %%
# A run with a selector. Its weights at the end are the scores.

model = classifier()
selector = mts_fast.Selector(num_features=4 + table.shape[1], num_classes=10)
step = mts_fast.MTSStep(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    selector,
    torch.optim.AdamW(selector.parameters(), lr=1e-3),
)
validation = {"val_inputs": digits.validation[0], "val_labels": digits.validation[1]}
for _ in range(STEPS):
    i = torch.randint(len(labels), (512,))
    batch = {"features": table[i], "is_synthetic": digits.is_synthetic[i]}
    step(images[i], labels[i], **batch, **validation)
scores = step.weights(
    images,
    labels,
    features=table,
    is_synthetic=digits.is_synthetic,
    val_inputs=digits.validation[0],
)

# %%
# Plain training on the real samples and some of the synthetic ones.


def accuracy(chosen: torch.Tensor) -> float:
    """Test accuracy of a classifier that was trained on these samples."""
    torch.manual_seed(1)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        i = chosen[torch.randint(len(chosen), (128,))]
        torch.nn.functional.cross_entropy(model(images[i]), labels[i]).backward()
        optimizer.step()
        optimizer.zero_grad()
    test_images, test_labels = digits.test
    return (model(test_images).argmax(1) == test_labels).float().mean().item()


real, synthetic = (~digits.is_synthetic).nonzero()[:, 0], digits.is_synthetic.nonzero()[:, 0]
best = synthetic[scores[synthetic].argsort(descending=True)[: len(synthetic) // 2]]
some = synthetic[torch.randperm(len(synthetic))[: len(best)]]
right = synthetic[~digits.wrong[synthetic]]
choices = {"random half": some, "best half": best, "right labels": right}
accuracies = {name: accuracy(torch.cat([real, chosen])) for name, chosen in choices.items()}
print(accuracies)

plt.bar(list(accuracies), list(accuracies.values()))
plt.ylabel("test accuracy")
plt.ylim(0.5, 1)
plt.show()
