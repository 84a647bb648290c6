"""Classifiers for the benchmarks of whole steps, and batches for them.

The models of BUILD are small enough for two CPU cores; gpu_models.py has larger ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mts_fast.hypergradient import LabelledBatch


class Attention(nn.Module):
    """Fused attention over [B, T, D]."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, causal):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Class token, learned positions; `size` and `patch` in pixels."""

    def __init__(self, classes, dim=192, depth=6, heads=3, size=32, patch=4):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, False) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))


class GPT(nn.Module):
    """Next-token logits [B, T, vocabulary]; the head is the embedding."""

    def __init__(self, vocabulary, dim=192, depth=4, heads=3, context=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(context, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem for 32 x 32 images; `width` channels in the first stage."""

    def __init__(self, classes, norm, width=32):
        super().__init__()
        stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU(inplace=True)]
        stages, inputs = [], width
        for i in range(4):
            outputs = width * 2**i
            stages += [
                BasicBlock(inputs, outputs, 1 if i == 0 else 2, norm),
                BasicBlock(outputs, outputs, 1, norm),
            ]
            inputs = outputs
        self.features = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.head(self.features(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut; the 3 x 3 one strides."""

    def __init__(self, inputs, width, stride, norm):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), norm(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width)),
            *(nn.ReLU(inplace=True), nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)),
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs)
            )

    def forward(self, x):
        return self.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 as torchvision has it; `width` channels in the first stage."""

    def __init__(self, classes, norm, width=64, depths=(3, 4, 6, 3)):
        super().__init__()
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU(inplace=True)]
        stages, inputs = [], width
        for i, depth in enumerate(depths):
            for j in range(depth):
                stride = 2 if i and not j else 1
                stages.append(Bottleneck(inputs, width * 2**i, stride, norm))
                inputs = 4 * width * 2**i
        pool = nn.MaxPool2d(3, 2, 1)
        self.features = nn.Sequential(*stem, pool, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.head(self.features(x))


def mlp(classes):
    """On embeddings of width 768, as a frozen backbone gives them."""
    return nn.Sequential(
        nn.Linear(768, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, classes)
    )


CLASSES = 10
VOCABULARY = 1024
CONTEXT = 64
BUILD = {
    "vit": lambda: ViT(CLASSES),
    "resnet18_groupnorm": lambda: ResNet18(CLASSES, lambda c: nn.GroupNorm(8, c)),
    "resnet18_batchnorm": lambda: ResNet18(CLASSES, nn.BatchNorm2d),
    "mlp": lambda: mlp(CLASSES),
    "gpt": lambda: GPT(VOCABULARY, context=CONTEXT),
}
BATCH = {
    "vit": 64,
    "resnet18_groupnorm": 64,
    "resnet18_batchnorm": 64,
    "mlp": 2048,
    "gpt": 64,
}


@dataclass(frozen=True)
class Task:
    """A seeded model and its batches."""

    model: nn.Module
    train: LabelledBatch
    validation: LabelledBatch
    selector_batch: LabelledBatch  # independent of train
    features: Tensor  # [B, 13] offline features
    num_classes: int  # of the selector


def make_task(name, batch=None, device="cpu"):
    """The task of a model of BUILD."""
    size = batch or BATCH[name]
    if name == "gpt":
        return task_of(BUILD[name], tokens(VOCABULARY, CONTEXT), size, device)
    shape = (768,) if name == "mlp" else (3, 32, 32)
    return task_of(BUILD[name], labelled(shape, CLASSES), size, device, CLASSES)


def task_of(build, draw, size, device, num_classes=CLASSES):
    """A task with V = B/8 and an independent selector batch of B samples, all random."""
    torch.manual_seed(0)
    model = build().to(device).train()
    batches = [draw(n, device) for n in (size, max(4, size // 8), size)]
    return Task(model, *batches, torch.randn(size, 13).to(device), num_classes)


def labelled(shape, classes):
    """A function that draws batches for classification."""

    def draw(n, device):
        inputs = torch.randn(n, *shape).to(device)
        return LabelledBatch(inputs, torch.randint(classes, (n,)).to(device))

    return draw


def tokens(vocabulary, context):
    """A function that draws batches for next-token prediction."""

    def draw(n, device):
        sequences = torch.randint(vocabulary, (n, context + 1)).to(device)
        return LabelledBatch(sequences[:, :-1], sequences[:, 1:])

    return draw
