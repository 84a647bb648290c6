"""The classifiers of a run on held-out samples, and the record of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mts_fast.pipeline.data import Role
from mts_fast.pipeline.data.samples import TRAINING
from mts_fast.pipeline.inputs import all_logits
from mts_fast.pipeline.outcome import Outcome, environment, rows_of
from mts_fast.pipeline.prepare import Prepared
from mts_fast.pipeline.team import Team

if TYPE_CHECKING:
    from mts_fast.pipeline.run import Run


def held_out(data: Prepared) -> Role:
    """The role that accuracies are of."""
    return "test" if "test" in data.members else "val"


def predictions_of(
    arms: Mapping[str, nn.Module], data: Prepared, device: torch.device, team: Team
) -> dict[str, Tensor]:
    """Predicted classes [T] of the held-out samples by each classifier."""
    members = data.members[held_out(data)]
    return {
        name: all_logits(model, data.inputs, members, device, team).argmax(1)
        for name, model in arms.items()
    }


def outcome_of(
    run: Run, weights: Tensor, predictions: Mapping[str, Tensor], easy: Tensor, clean: Tensor
) -> Outcome:
    """What is written of a run.

    Args:
        predictions: [T] each, of the held-out samples by every arm.
        easy: [M] and `clean` [M, C], probabilities under the classifiers of everything and of the
            clean data.
    """
    data, role = run.data, held_out(run.data)
    if role == "val":
        what = "no --test: accuracies are of the validation set, which trainings have seen"
        run.findings.remark(what)
    members, groups = data.members[role], data.samples[role].groups
    labels = data.labels[run.pool.members]
    tensors = {
        "members": run.pool.members,
        "held_out": members,
        "labels": labels,
        "predicted": clean.argmax(1),
        "confidence": clean.amax(1),
        "clean": clean.gather(1, labels[:, None]).flatten(),
        "everything": easy,
    }
    figures = {}
    for name, predicted in predictions.items():
        right = predicted == data.labels[members]
        tensors[f"right/{name}"] = right.to(torch.uint8)
        figures[name] = {"accuracy": float(right.double().mean())}
        if groups is not None:
            figures[name]["worst_group"] = worst_group(right, groups)
        record = {f"{role}_{key}": value for key, value in figures[name].items()}
        run.records.log({"stage": "evaluation", "arm": name, **record, "samples": len(right)})
    return Outcome(
        folder=run.out,
        config=run.config.model_dump(),
        classes=data.classes,
        arms=figures,
        held_out=role,
        stages=run.stages.used,
        store=str(data.store.relative_to(run.out)),
        remarks=tuple(run.findings.remarks),
        copies=tuple(data.copies),
        groups=groups,
        environment=environment(run.device),
        rows=rows_of([data.samples[role] for role in TRAINING], weights.tolist()),
        tensors=tensors,
    )


def worst_group(right: Tensor, groups: tuple[str, ...]) -> float:
    """The lowest accuracy of a group; right [T] is bool."""
    members: dict[str, list[bool]] = {}
    for value, group in zip(right.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    return min(sum(values) / len(values) for values in members.values())
