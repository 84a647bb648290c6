"""The classifiers of bench_step.py and bench_gradient_norm.py, small enough for two CPU cores."""

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
    """Class token, learned positions; patches of 4 x 4 pixels."""

    def __init__(self, classes, dim=192, depth=6, heads=3, size=32):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 1 + (size // 4) ** 2, dim) * 0.02)
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


def mlp(classes):
    """On embeddings of 768 numbers, as of a frozen backbone."""
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
    """A seeded model and its batches; `classes` is what the selector takes for the label."""

    model: nn.Module
    train: LabelledBatch
    validation: LabelledBatch
    meta: LabelledBatch
    features: Tensor  # [B, 13] offline features


def make_task(name, batch=None, device="cpu"):
    """V = B/8; an independent selector batch of B samples; all drawn at random."""
    torch.manual_seed(0)
    size = batch or BATCH[name]
    model = BUILD[name]().to(device).train()

    def draw(n):
        if name == "gpt":
            tokens = torch.randint(VOCABULARY, (n, CONTEXT + 1)).to(device)
            return LabelledBatch(tokens[:, :-1], tokens[:, 1:])
        shape = (768,) if name == "mlp" else (3, 32, 32)
        return LabelledBatch(
            torch.randn(n, *shape).to(device), torch.randint(CLASSES, (n,)).to(device)
        )

    return Task(
        model, draw(size), draw(max(4, size // 8)), draw(size), torch.randn(size, 13).to(device)
    )
