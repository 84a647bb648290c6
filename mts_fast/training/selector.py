"""The selector: the meta-network that says how much each sample counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mts_fast._check import (
    check_flags,
    check_floating,
    check_integer,
    check_length,
    check_positive_int,
    fail,
)

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

    Source: the paper's selector; DESIGN row 1.

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
        check_positive_int(OP, "num_classes", num_classes)
        width = num_features + class_embedding + group_embedding
        if num_features < 0 or width < 1:
            fail(ValueError, OP, "num_features", "such that the input is not empty", num_features)
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
        """Logits z [B] of features [B, F], classes [B] and is_synthetic [B]."""
        self._check(features, classes, is_synthetic)
        parts = [features]
        if self.class_embed is not None:
            parts.append(self.class_embed(classes))
        if self.group_embed is not None:
            parts.append(self.group_embed(is_synthetic.long()))
        return self.mlp(torch.cat(parts, dim=1)).squeeze(1)

    def _check(self, features: Tensor, classes: Tensor, is_synthetic: Tensor) -> None:
        check_floating(OP, "features", features, ndim=2)
        if features.shape[1] != self.num_features:
            hint = "online features add k + 1 columns to those you pass"
            expected = f"[B, {self.num_features}] as the selector was built"
            fail(ValueError, OP, "features", expected, tuple(features.shape), hint)
        check_integer(OP, "classes", classes, ndim=1)
        check_length(OP, "classes", classes, len(features))
        check_flags(OP, "is_synthetic", is_synthetic, len(features))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups with weight decay on everything whose name does not end in `bias`.

    Example:
        >>> import torch, mts_fast
        >>> selector = mts_fast.Selector(num_features=3, num_classes=2)
        >>> groups = mts_fast.training.parameter_groups(selector, weight_decay=1e-4)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
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
    """Linear warm-up over `warmup_steps`, then a cosine to 0 at `total_steps`.

    Example:
        >>> import torch, mts_fast
        >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = mts_fast.training.warmup_cosine(optimizer, 10, 100)
    """
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    op = "warmup_cosine"
    check_positive_int(op, "total_steps", total_steps)
    if not 0 <= warmup_steps < total_steps:
        fail(ValueError, op, "warmup_steps", f"in [0, {total_steps})", warmup_steps)
    cosine = CosineAnnealingLR(optimizer, total_steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    start = LinearLR(optimizer, 1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [start, cosine], milestones=[warmup_steps])
