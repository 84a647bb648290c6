"""Deep and narrow models: as many layers and parameters as real ones, next to no arithmetic."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DeepViT(nn.Module):
    """12 blocks, 152 parameter tensors."""

    def __init__(self, width=16, depth=12, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class Residual(nn.Module):
    """Basic block, or bottleneck of a quarter of the width."""

    def __init__(self, before, width, stride, *, bottleneck):
        super().__init__()
        inner = width // 4 if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = [before, *[inner] * (len(kernels) - 1), width]
        layers = []
        for i, kernel in enumerate(kernels):
            moves = stride if kernel == 3 and (bottleneck or i == 0) else 1
            shape = widths[i], widths[i + 1], kernel, moves, kernel // 2
            layers += [nn.Conv2d(*shape, bias=False), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.short = nn.Identity()
        if stride != 1 or before != width:
            short = nn.Conv2d(before, width, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x))


def resnet(blocks, *, bottleneck, width=4):
    """ResNet with BatchNorm: (2, 2, 2, 2) blocks are an 18's, (3, 4, 6, 3) bottlenecks a 50's."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before, times = width, 4 if bottleneck else 1
    for stage, count in enumerate(blocks):
        after = width * times * 2**stage
        for i in range(count):
            stride = 2 if i == 0 and stage else 1
            layers.append(Residual(before, after, stride, bottleneck=bottleneck))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


DEEP_MODELS = {
    "ViT-12": DeepViT,
    "ResNet-18": lambda: resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
}
