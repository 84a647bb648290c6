"""The samples that weights are learned for, and their features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mts_fast.distributed import Shard, distribution_features
from mts_fast.features import (
    FeatureTable,
    OnlineStandardizer,
    PenultimateFeatures,
    online_features,
    training_dynamics,
)
from mts_fast.pipeline.config import Config
from mts_fast.pipeline.inputs import EVALUATION_BATCH, Inputs, run_model
from mts_fast.pipeline.team import ALONE, Team

DYNAMICS_COLUMNS = ("loss", "gradient_norm", "error_norm")
# of the online features; fewer where there are fewer validation samples
ONLINE_K = 3


@dataclass(frozen=True)
class Pool:
    """What the weights are learned for: members of the inputs, real ones first."""

    inputs: Inputs
    labels: Tensor  # of all inputs
    members: Tensor  # [M]
    is_synthetic: Tensor  # [M]
    val: Tensor  # members of the validation set
    classes: int

    def places(self) -> Tensor:
        """Index in the pool of every input, -1 where it is not of the pool."""
        places = torch.full((len(self.labels),), -1)
        places[self.members] = torch.arange(len(self.members))
        return places


@torch.no_grad()
def embeddings_of(
    model: nn.Module,
    inputs: Inputs,
    members: Tensor,
    device: torch.device,
    team: Team = ALONE,
) -> Tensor:
    """Penultimate features [M, D] of `members` [M], on the CPU; the model is left in eval mode."""
    model.to(device).eval()
    with PenultimateFeatures(model).capture() as penultimate:

        def compute(indices: Tensor) -> list[Tensor]:
            run_model(model, inputs.batch(indices, device))
            return [penultimate.taken(len(indices)).float().cpu()]

        return team.mapped("embeddings", members, EVALUATION_BATCH, compute)[0]


def dynamics_of(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    members: Tensor,
    device: torch.device,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """Columns of the training dynamics at the end of a short training, by name."""
    model.to(device).eval()

    def compute(indices: Tensor) -> list[Tensor]:
        columns = training_dynamics(
            model, inputs.batch(indices, device), labels[indices].to(device)
        )
        return [columns[name].cpu() for name in DYNAMICS_COLUMNS]

    columns = team.mapped("training dynamics", members, EVALUATION_BATCH, compute)
    return dict(zip(DYNAMICS_COLUMNS, columns, strict=True))


def distribution_of(
    embeddings: Tensor, labels: Tensor, is_synthetic: Tensor, team: Team = ALONE
) -> dict[str, Tensor]:
    """Distribution features [M, width] of a pool that every process has, each computing a part.

    Args:
        embeddings: [M, D]; labels and is_synthetic [M].
    """
    rows = [team.part(t) for t in (embeddings, labels, is_synthetic)]
    group = "auto" if team.size > 1 else None
    columns = distribution_features(*rows, small_class="pad", process_group=group)
    shard = Shard(team.sizes(len(labels)), team.index)
    whole = team.ranks.rows("distribution features", shard, lambda: list(columns.values()))
    return dict(zip(columns, whole, strict=True))


def features_of(
    embeddings: Tensor,
    dynamics: nn.Module,
    forgetting: Tensor,
    pool: Pool,
    device: torch.device,
    team: Team = ALONE,
) -> FeatureTable:
    """The paper's offline columns of the pool.

    Args:
        embeddings: [M, D].
        dynamics: the classifier of the short training.
        forgetting: [M, 1], forgetting events of that training.
    """
    labels = pool.labels[pool.members]
    table = FeatureTable(distribution_of(embeddings, labels, pool.is_synthetic, team))
    table.update(dynamics_of(dynamics, pool.inputs, pool.labels, pool.members, device, team))
    table.update({"forgetting_counts": forgetting})
    return table


def online_of(embeddings: Tensor, val: Tensor) -> Tensor:
    """[M, k + 1]: cosines to the k nearest validation samples and to their mean.

    Args:
        embeddings: [M, D] and val [V, D]: penultimate features under the classifier of MTS.
    """
    parts = [
        torch.cat(online_features(part, val, k=min(ONLINE_K, len(val))), dim=1)
        for part in embeddings.split(EVALUATION_BATCH)
    ]
    return torch.cat(parts)


def selector_inputs(online: Tensor, pool_online: Tensor, offline: Tensor) -> Tensor:
    """[M, k + 1 + F]: what the selector takes, online features standardised by the pool.

    Args:
        online: [M, k + 1], and those of the pool [P, k + 1].
        offline: [M, F], standardised.
    """
    standardizer = OnlineStandardizer(momentum=0.0)
    columns = []
    for name, of in (("nearest", slice(None, -1)), ("centroid", slice(-1, None))):
        standardizer(name, pool_online[:, of])
        columns.append(standardizer(name, online[:, of], update=False))
    return torch.cat([*columns, offline], dim=1)


def class_weights_of(config: Config, labels: Tensor, classes: int) -> Tensor | None:
    """[C]: factor of each class, by the labels [M] of the pool; None where all are 1."""
    if config.class_weights == "none":
        return None
    counts = labels.bincount(minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts)
