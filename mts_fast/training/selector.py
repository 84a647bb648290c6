"""The selector: the meta-network that says how much each sample counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mts_fast._check import (
    check_device,
    check_flags,
    check_floating,
    check_int,
    check_integer,
    check_length,
    check_module,
    check_number,
    check_positive_int,
    check_range,
    describe,
    fail,
)
from mts_fast.backends.eligibility import under_transform

OP = "Selector"


class Selector(nn.Module):
    """MLP on sample features, a class embedding and a real/synthetic embedding; one logit each.

    w_i = sigmoid(selector(h_i)); the sigmoid is taken in log space by `normalize_weights`.

    Args:
        num_features: F, width of the features, online ones included (the paper: 4 + 13 = 17).
        num_classes: C.
        hidden: widths of the hidden layers.
        class_embedding: width of the class embedding; 0 leaves it out.
        group_embedding: width of the real/synthetic embedding; 0 leaves it out.

    Raises:
        TypeError, ValueError: widths that are not whole numbers, or negative, or leave no input.

    Source: the paper's selector; row 1 of docs/algorithm.md.

    Example:
        >>> import torch, mts_fast
        >>> selector = mts_fast.Selector(num_features=17, num_classes=10)
        >>> h, y, s = torch.randn(5, 17), torch.arange(5), torch.zeros(5, dtype=torch.bool)
        >>> selector(h, y, s).shape
        torch.Size([5])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        hidden: Sequence[int] = (100, 100),
        class_embedding: int = 4,
        group_embedding: int = 1,
    ) -> None:
        super().__init__()
        check_int(OP, "num_features", num_features)
        check_positive_int(OP, "num_classes", num_classes)
        check_int(OP, "class_embedding", class_embedding)
        check_int(OP, "group_embedding", group_embedding)
        width = num_features + class_embedding + group_embedding
        if width < 1:
            hint = "give it features or an embedding"
            fail(ValueError, OP, "num_features", "such that there is an input", num_features, hint)
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            hint = "pass for example (100, 100); () leaves them out"
            fail(TypeError, OP, "hidden", "a sequence of widths", describe(hidden), hint)
        for index, size in enumerate(hidden):
            check_int(OP, f"hidden[{index}]", size, low=1)
        self.num_features = num_features
        self.num_classes = num_classes
        self.class_embed = nn.Embedding(num_classes, class_embedding) if class_embedding else None
        self.group_embed = nn.Embedding(2, group_embedding) if group_embedding else None
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor, classes: Tensor, is_synthetic: Tensor) -> Tensor:
        """Logits z [B] of features [B, F], classes [B] and is_synthetic [B].

        Features are converted to the parameters' dtype; classes may be of any integer dtype.

        Raises:
            TypeError, ValueError: wrong dtypes, shapes, lengths or devices; on the CPU, classes
                outside [0, C).
        """
        like: Tensor = self.mlp[-1].weight  # type: ignore[assignment]
        self._check(features, classes, is_synthetic, like.device)
        parts = [features.to(like.dtype)]
        if self.class_embed is not None:
            parts.append(self.class_embed(classes.long()))
        if self.group_embed is not None:
            parts.append(self.group_embed(is_synthetic.long()))
        return self.mlp(torch.cat(parts, dim=1)).squeeze(1)

    def _check(
        self, features: Tensor, classes: Tensor, is_synthetic: Tensor, device: torch.device
    ) -> None:
        check_floating(OP, "features", features, ndim=2)
        if features.shape[1] != self.num_features:
            hint = (
                f"build it with num_features={features.shape[1]}; online features of MTSStep"
                " (online_k + 1 columns) come before those you pass"
            )
            expected = f"[B, {self.num_features}] as the selector was built"
            fail(ValueError, OP, "features", expected, tuple(features.shape), hint)
        check_integer(OP, "classes", classes, ndim=1)
        check_length(OP, "classes", classes, len(features))
        check_flags(OP, "is_synthetic", is_synthetic, len(features))
        arguments = (("features", features), ("classes", classes), ("is_synthetic", is_synthetic))
        for name, value in arguments:
            check_device(OP, name, value, device, "its parameters")
        # values cannot be read under vmap or torch.compile; reading them from a GPU would wait
        if classes.device.type == "cpu" and not (
            torch.compiler.is_compiling() or under_transform()
        ):
            hint = "num_classes is that of the selector"
            check_range(OP, "classes", classes, 0, self.num_classes, hint)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups with weight decay on everything whose name does not end in `bias`.

    Raises:
        TypeError, ValueError: no module, or one without trainable parameters; a weight decay that
            is no number, or negative.

    Example:
        >>> import torch, mts_fast
        >>> selector = mts_fast.Selector(num_features=3, num_classes=2)
        >>> groups = mts_fast.training.parameter_groups(selector, weight_decay=1e-4)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    op = "parameter_groups"
    check_module(op, "module", module)
    check_number(op, "weight_decay", weight_decay, at_least=0)
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        hint = "call .requires_grad_() on it"
        fail(ValueError, op, "module", "given trainable parameters", "none", hint)
    return [
        {
            "params": [p for n, p in named if not n.endswith("bias")],
            "weight_decay": weight_decay,
        },
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
    ]


def warmup_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over `warmup_steps`, then a cosine to 0 at `total_steps`, and 0 from there on.

    Raises:
        TypeError, ValueError: no optimizer; steps that are no whole numbers, negative, or a
            warm-up that is not below total_steps.

    Example:
        >>> import torch, mts_fast
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = mts_fast.training.warmup_cosine(optimizer, 10, 100)
    """
    op = "warmup_cosine"
    if not isinstance(optimizer, torch.optim.Optimizer):
        hint = "make it before its schedule"
        fail(TypeError, op, "optimizer", "a torch.optim.Optimizer", describe(optimizer), hint)
    check_positive_int(op, "total_steps", total_steps)
    check_int(op, "warmup_steps", warmup_steps)
    if warmup_steps >= total_steps:
        hint = "count total_steps with the warm-up"
        fail(ValueError, op, "warmup_steps", f"in [0, {total_steps})", warmup_steps, hint)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _WarmupCosine(warmup_steps, total_steps))


@dataclass
class _WarmupCosine:
    """Factor of the learning rate at a step; a class, so that the schedule can be pickled."""

    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        share = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return (1 + math.cos(math.pi * share)) / 2 if share < 1 else 0.0
