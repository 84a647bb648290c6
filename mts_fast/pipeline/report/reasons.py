"""Which features moved a sample's weight: integrated gradients of the selector, by captum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from mts_fast.features import PAPER_COLUMNS
from mts_fast.pipeline.score import TrainedSelector

# features in the words of the page
WORDS = {
    "val_nearest": "similarity to the nearest validation samples",
    "val_centroid": "similarity to the mean of the validation samples",
    "real_centroid_cosine": "similarity to the mean of the class's real samples",
    "synthetic_centroid_cosine": "similarity to the mean of the class's synthetic samples",
    "real_nearest3_cosine": "similarity to the nearest real samples of the class",
    "synthetic_nearest3_cosine": "similarity to the nearest synthetic samples of the class",
    "knn5_weighted_label_agreement": "neighbours of the same class",
    "distance_to_median_percentile": "distance to the middle of the class",
    "gradient_norm": "size of the gradient after the short training",
    "error_norm": "size of the error after the short training",
    "forgetting_counts": "times that the short training forgot it",
}
STEPS = 50
# samples at a time
CHUNK = 4096
SHOWN = 2


@dataclass(frozen=True)
class Reasons:
    """Attributions [M, F] to the selector's logit and values [M, F] in standard deviations of the
    pool, of features with these names."""

    names: tuple[str, ...]
    attributions: Tensor
    values: Tensor

    def of(self, index: int) -> list[str]:
        """The features that moved a sample most, in words."""
        order = self.attributions[index].abs().argsort(descending=True)[:SHOWN]
        return [self._sentence(index, int(i)) for i in order]

    def _sentence(self, index: int, feature: int) -> str:
        value, effect = float(self.values[index, feature]), float(self.attributions[index, feature])
        size = "high" if value >= 0 else "low"
        does = "raises" if effect >= 0 else "lowers"
        words = WORDS[self.names[feature]]
        return f"{words}: {size} ({value:+.1f} SD), {does} it ({effect:+.2f})"

    def importances(self) -> list[tuple[str, float]]:
        """Mean absolute attribution of each feature, the largest first."""
        means = self.attributions.abs().mean(0)
        return [
            (WORDS[self.names[int(i)]], float(means[i])) for i in means.argsort(descending=True)
        ]


def explain(trained: TrainedSelector) -> Reasons:
    """Integrated gradients of the selector at the end of the run, from the mean sample of the pool
    (all features 0) to each sample. They add up to its logit minus that of the mean sample."""
    inputs = trained.pool_inputs()
    method = IntegratedGradients(trained.selector)
    parts = []
    for i in torch.arange(len(inputs)).split(CHUNK):
        flags = (trained.labels[i], trained.is_synthetic[i])
        part = method.attribute(inputs[i], additional_forward_args=flags, n_steps=STEPS)
        parts.append(part.detach())
    attributions = torch.cat(parts).float()
    widths = {"val_nearest": trained.online.shape[1] - 1, "val_centroid": 1}
    widths |= {name: trained.table[name].shape[1] for name in PAPER_COLUMNS}
    sizes = list(widths.values())
    return Reasons(
        tuple(widths),
        torch.stack([part.sum(1) for part in attributions.split(sizes, 1)], 1),
        torch.stack([part.mean(1) for part in inputs.split(sizes, 1)], 1),
    )
