"""The models of the GPU benchmarks: ResNet-50 and ViT-S at 224 x 224, and a GPT of 125M."""

from on_gpu import choose
from step_models import GPT, ResNet50, ViT, labelled, task_of, tokens
from torch import nn

CLASSES = choose(1000, 7)
PIXELS = choose(224, 16)
VOCABULARY = choose(50_257, 50)
CONTEXT = choose(512, 6)
GROUPS = choose(32, 4)
RESNET = choose({}, {"width": 8, "depths": (1, 1)})
VIT = choose(
    {"dim": 384, "depth": 12, "heads": 6, "patch": 16},
    {"dim": 16, "depth": 1, "heads": 2, "patch": 8},
)
GPT_125M = choose(
    {"dim": 768, "depth": 12, "heads": 12, "context": CONTEXT},
    {"dim": 16, "depth": 1, "heads": 2, "context": CONTEXT},
)
BUILD = {
    "resnet50_batchnorm": lambda: ResNet50(CLASSES, nn.BatchNorm2d, **RESNET),
    "resnet50_groupnorm": lambda: ResNet50(CLASSES, lambda c: nn.GroupNorm(GROUPS, c), **RESNET),
    "vit_s": lambda: ViT(CLASSES, size=PIXELS, **VIT),
    "gpt_125m": lambda: GPT(VOCABULARY, **GPT_125M),
}


def make_gpu_task(name, batch, device):
    """The task of a model of BUILD; for sequences the selector gets no class."""
    if name == "gpt_125m":
        return task_of(BUILD[name], tokens(VOCABULARY, CONTEXT), batch, device)
    draw = labelled((3, PIXELS, PIXELS), CLASSES)
    return task_of(BUILD[name], draw, batch, device, CLASSES)
