"""The function that engines differentiate: model and loss, giving one loss per sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mts_fast import ops
from mts_fast._check import describe, fail

# (model output, labels) -> per-sample losses [B]
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class LabelledBatch:
    """Inputs and labels of B samples, first axis B everywhere.

    inputs: one tensor, a tuple or list (`model(*inputs)`), or a mapping (`model(**inputs)`).
    """

    inputs: Any
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> list[Tensor]:
        """All tensors among the inputs."""
        return _leaves(self.inputs)

    def split(self, size: int | None) -> list[LabelledBatch]:
        """Views of at most `size` samples each, in order; the whole batch for None."""
        if size is None or size >= len(self):
            return [self]
        return [
            LabelledBatch(_rows(self.inputs, slice(i, i + size)), self.labels[i : i + size])
            for i in range(0, len(self), size)
        ]


def _leaves(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if isinstance(inputs, tuple | list | Mapping):
        return [leaf for value in values for leaf in _leaves(value)]
    return []


def _rows(inputs: Any, rows: slice) -> Any:
    """Some samples of all tensors in a nest of inputs; tensors without axes are shared."""
    if isinstance(inputs, Tensor):
        return inputs[rows] if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {name: _rows(value, rows) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [_rows(value, rows) for value in inputs]
    return inputs


class Objective:
    """Per-sample losses of a model.

    Without `loss` the output must be logits [B, C] or [B, T, C], or carry them as `.logits` or
    `["logits"]`, and the loss is the cross-entropy.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        self.model = model
        self.loss = loss

    def forward(self, inputs: Any) -> Any:
        """The model's output, in whatever mode it is in."""
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        if isinstance(inputs, tuple | list):
            return self.model(*inputs)
        return self.model(inputs)

    def losses(self, batch: LabelledBatch) -> Tensor:
        """Per-sample losses [B]."""
        return self.losses_of(self.forward(batch.inputs), batch.labels)

    def losses_of(self, output: Any, labels: Tensor) -> Tensor:
        """Per-sample losses [B] of an output that is already there."""
        if self.loss is None:
            return ops.cross_entropy(logits_of(output), labels)
        losses = self.loss(output, labels)
        if not isinstance(losses, Tensor) or losses.shape != labels.shape[:1]:
            hint = "return one loss per sample, for example with reduction='none'"
            expected = f"a tensor of shape ({labels.shape[0]},)"
            fail(ValueError, "MTSStep", "loss(output, labels)", expected, describe(losses), hint)
        return losses


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        hint = "pass loss= to say what your model's output means"
        fail(TypeError, "MTSStep", "the model's output", "logits", describe(output), hint)
    return output
